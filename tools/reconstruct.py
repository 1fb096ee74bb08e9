"""Reconstruct images: python tools/reconstruct.py run=runs/demo n=8 out=reconstructions.png"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command
from dvae.tools.sample import own_sampler

ABOUT = Command(
    name="reconstruct",
    text="""Encode images, decode the posterior mean of z, and refine the decoded images.

  python tools/reconstruct.py run=runs/demo n=8                               # held-out images: reconstructions.png
  python tools/reconstruct.py run=runs/demo images=faces/ resize=true out=refined/     # all images of a folder
  python tools/reconstruct.py run=runs/demo images=faces.npy out=all.npy original=true vae=true

- images= takes the run's held-out images, or your own. If they have another size, add resize=true.
- A picture shows the image, the VAE's reconstruction and the refined image. Other formats hold the refined images; with
  original=true vae=true they hold all three side by side.
- If the run diffuses latents, the result is the decoder's image: it is not refined.
- Image k has noise k of the seed. On the CPU it has the same bits for any n and any number of processes.
- The same command resumes after an interruption. Formats, samplers and guidance: `python tools/sample.py --help`.""",
    settings=("dvae.inference.generation.generation_settings:ReconstructConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Draw what the words ask for, and say what it took."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.inference.generation.edit_tasks import ReconstructTask
    from dvae.inference.generation.generate import generate_to_file

    settings = compose.tool_settings(compose.compose("reconstruct", own_sampler(argv)))
    done = generate_to_file(settings, ReconstructTask)
    print(f"{settings.out}: {done.n} reconstructions, {done}")


if __name__ == "__main__":
    run_command(command)
