"""Move images along a direction: python tools/edit.py run=runs/demo direction=NAME out=edits.png"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command
from dvae.tools.sample import own_sampler

ABOUT = Command(
    name="edit",
    text="""Move images along a direction of the latent space, and refine the result.

  python tools/edit.py run=runs/demo direction=hair.bun                           # held-out images, five strengths each
  python tools/edit.py run=runs/demo direction=hair.bun strength=1 n=16           # one strength
  python tools/edit.py run=runs/demo direction=pca_1 strengths=[-3,0,3] images=drawn seed=7
  python tools/edit.py run=runs/demo direction=hair.bun images=faces/ resize=true out=edited/

- tools/directions.py finds the directions, and lists their names.
- The command adds strength times the direction to z of each image, and refines with the image's own noise. At strength
  0 the result is the reconstruction.
- images= takes the run's held-out images, or your own. If they have another size, add resize=true.
- A picture shows the image at the left. With a VAE, its images stand in a row above the refined images.
- The same command resumes after an interruption. Formats, samplers and guidance: `python tools/sample.py --help`.""",
    settings=("dvae.inference.generation.generation_settings:EditConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Draw what the words ask for, and say what it took."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.inference.generation.edit_tasks import EditTask
    from dvae.inference.generation.generate import generate_to_file

    settings = compose.tool_settings(compose.compose("edit", own_sampler(argv)))
    done = generate_to_file(settings, EditTask)
    print(f"{settings.out}: {done.n} edited images, {done}")


if __name__ == "__main__":
    run_command(command)
