"""Recognize the classes of samples: python tools/recognize.py run=runs/mnist n=1000 out=recognized.png"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="recognize",
    text="""Count which classes the samples of a run show, with a classifier trained on the labeled real images.

  python tools/recognize.py run=runs/mnist                                # recognized.png and recognized.json
  python tools/recognize.py run=runs/mnist n=5000 confidence=0.95
  python tools/recognize.py run=runs/demo label=mouth sampler=ddim sampler.steps=10

- A sample is recognized if the classifier gives one class a probability above `confidence`. The command prints the
  share of recognized samples, and their number in each class.
- Held-out images are classified in the same way, for comparison: as they are (the best possible result), and blended
  in pairs.
- The classifier has one more class, "nothing", which it learns from corrupted images.
- The picture has a row for each class, then a row of samples that were not recognized.""",
    settings=("dvae.evaluation.recognizer:RecognizeConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Compose the settings, classify the samples, and print the figures."""
    argv = ABOUT.arguments(argv)
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
