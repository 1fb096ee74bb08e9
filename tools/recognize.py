"""Recognize the classes of samples: python tools/recognize.py run=runs/mnist n=1000 out=recognized.png"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/recognize.py run=FOLDER [n=1000] [seed=0] [confidence=0.9] [label=ATTRIBUTE]
       [out=recognized.png] [shards=FOLDER] [steps=1500] [batch=64] [sampler=NAME sampler.FIELD=VALUE]

Trains a small classifier on the labeled real images that the run was trained on, and says which share of n samples it
recognizes (probability of one class above `confidence`), and how many of each class. out= is a picture: a row per
class, then samples that were not recognized; the figures lie in a JSON file beside it.
Held-out images are classified in the same way: as they are, which is the best possible result, and blended in pairs.
The classifier has one class more, "nothing", which it learns from corrupted images."""


def command(argv: list[str]) -> None:
    """Compose the settings, classify the samples, and print the figures."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    from dvae.config import compose
    from dvae.evaluation import recognizer

    settings: recognizer.RecognizeConfig = compose.tool_settings(compose.compose("recognize", argv))
    figures = recognizer.recognize_samples(settings)
    print(f"recognizer: {100 * figures['accuracy_heldout']:.1f}% right on held-out images")
    for name, title in (
        ("samples", "samples"),
        ("heldout", "held-out images"),
        ("heldout_blended", "held-out images, two laid over each other"),
    ):
        found = figures[name]
        print(
            f"{title}: {100 * found['recognized']:.1f}% of {found['n']} recognized above {settings.confidence:g}, "
            f"{found['classes_present']} of {len(found['by_class'])} classes"
        )
    print("samples by class: " + ", ".join(f"{name} {count}" for name, count in figures["samples"]["by_class"].items()))
    print(f"{settings.out}: a row per class; the last row was not recognized")


if __name__ == "__main__":
    run_command(command)
