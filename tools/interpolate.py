"""Interpolate between images: python tools/interpolate.py run=runs/demo n=4 space=z out=strips.png"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command
from dvae.tools.sample import own_sampler

ABOUT = Command(
    name="interpolate",
    text="""Interpolate between pairs of images in z, in the noise, or in both.

  python tools/interpolate.py run=runs/demo n=4                            # four strips between held-out images
  python tools/interpolate.py run=runs/demo space=z steps=12               # z changes, the noise stays
  python tools/interpolate.py run=runs/demo images=drawn space=noise seed=7    # between samples of a seed
  python tools/interpolate.py run=runs/demo images=faces/ resize=true out=strips/

- Strip k goes from image 2k to image 2k + 1. Both ends are part of the strip.
- z is interpolated linearly, or spherically (slerp) if the prior is N(0, I). Noise is interpolated spherically.
- A run that diffuses latents, or has no encoder, needs images=drawn space=noise.
- images= takes the run's held-out images, or your own. If they have another size, add resize=true.
- A picture shows the two images at the ends of each strip. With a VAE, its images stand in a row above the refined
  images.
- The same command resumes after an interruption. Formats, samplers and guidance: `python tools/sample.py --help`.""",
    settings=("dvae.inference.generation.generation_settings:InterpolateConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Draw what the words ask for, and say what it took."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.inference.generation.edit_tasks import InterpolateTask
    from dvae.inference.generation.generate import generate_to_file

    settings = compose.tool_settings(compose.compose("interpolate", own_sampler(argv)))
    done = generate_to_file(settings, InterpolateTask)
    print(f"{settings.out}: {done.n} strips, {done}")


if __name__ == "__main__":
    run_command(command)
