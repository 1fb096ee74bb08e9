"""Draw images: python tools/sample.py run=runs/demo n=64 seed=0 out=samples.png"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="sample",
    text="""Draw images from a trained run or a bundle.

  python tools/sample.py run=runs/demo                                      # 64 images into samples.png
  python tools/sample.py run=runs/demo n=50000 out=faces/ processes=4       # a folder of PNG files
  python tools/sample.py run=runs/demo sampler.steps=10                     # the run's own sampler, with 10 steps
  python tools/sample.py run=runs/demo sampler=dpmpp_2m sampler.steps=20    # another sampler
  python tools/sample.py run=runs/faces_guided label=smile label_guidance=2     # one class, guided

The name of out= selects the format:
  NAME.png     one picture; with a VAE, each refined image stands at the right of its VAE sample
  NAME/        a folder of PNG files: 000000.png, 000001.png, ...
  NAME.npy     a uint8 array of shape (n, H, W, C)
  NAME.zip     a zip archive of PNG files
  NAME.tar     a WebDataset shard of PNG files

- The same command resumes after an interruption.
- On the CPU, image k of a seed has the same bits for any n, first and processes. With batch=, which can be faster, a
  pixel can differ by one gray level in fp32, and by a few in bf16.
- sampler.FIELD=VALUE sets a field of the run's own sampler, or of the sampler that sampler= names. For example,
  sampler.temperature scales the starting noise.
- Guidance weights: 0 ignores the condition, 1 is the trained model, above 1 is stronger. They need a run that was
  trained with dropped conditions; classifier_guidance needs a run with a classifier.""",
    settings=("dvae.inference.generation.generation_settings:SampleConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Draw what the words ask for, and say what it took."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.inference.generation.generate import generate_to_file

    settings = compose.tool_settings(compose.compose("sample", own_sampler(argv)))
    done = generate_to_file(settings)
    print(f"{settings.out}: {done.n} samples, {done}")


def own_sampler(words: list[str]) -> list[str]:
    """The words, with sampler.FIELD=VALUE as Hydra wants it where no sampler is named: fields of the run's own."""
    if any(word.startswith("sampler=") for word in words):
        return words
    return [f"+{word}" if word.startswith("sampler.") else word for word in words]


if __name__ == "__main__":
    run_command(command)
