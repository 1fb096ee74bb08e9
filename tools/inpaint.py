"""Draw parts of images anew: python tools/inpaint.py run=runs/demo mask=left out=inpainted.png"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command
from dvae.tools.sample import own_sampler

ABOUT = Command(
    name="inpaint",
    text="""Keep a part of each image, and draw the rest anew.

  python tools/inpaint.py run=runs/demo mask=left                          # keep the left half of held-out images
  python tools/inpaint.py run=runs/demo mask=mask.png images=faces/ resize=true out=inpainted/
  python tools/inpaint.py run=runs/demo mask=border n=16 sampler=em sampler.steps=100

- The known part of an image keeps its exact values.
- The sampler must move all images in the same steps, such as ddim or em. The refiner of the run must draw pixels.
- images= takes the run's held-out images, or your own. If they have another size, add resize=true.
- A picture shows the image, its known part, the VAE's image and the inpainted image.
- The same command resumes after an interruption. Formats, samplers and guidance: `python tools/sample.py --help`.""",
    settings=("dvae.inference.generation.generation_settings:InpaintConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Draw what the words ask for, and say what it took."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.inference.generation.edit_tasks import InpaintTask
    from dvae.inference.generation.generate import generate_to_file
    from dvae.inference.inpainting import NAMED_MASKS

    settings = compose.tool_settings(compose.compose("inpaint", own_sampler(argv)))
    done = generate_to_file(settings, InpaintTask)
    print(f"{settings.out}: {done.n} inpainted images, {done}")
    known = NAMED_MASKS.get(settings.mask, "what is white in the picture")
    print(f"known and kept: {known}; the rest was drawn anew")


if __name__ == "__main__":
    run_command(command)
