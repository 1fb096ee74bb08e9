"""Find directions of a latent space: python tools/directions.py run=runs/demo find=[labels,pca]"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command
from dvae.tools.sample import own_sampler

ABOUT = Command(
    name="directions",
    text="""Find, list and score directions in the latent space of a run.

  python tools/directions.py run=runs/demo                                # list the directions of the run
  python tools/directions.py run=runs/demo find=[labels,pca,jacobian]     # find directions by three methods
  python tools/directions.py run=runs/demo find=[labels] labels=[hair]    # for one attribute
  python tools/directions.py run=runs/demo score=true                     # measure their effect: directions.md

find= takes one or more methods, and stores the directions with the run for tools/edit.py:
  labels       one direction for each value of each attribute that the images are labeled with
  pca          the principal components of the latents
  jacobian     the directions that change the decoder's image most

score=true trains a classifier on the labeled real images. It reports which attributes each direction changes, in x_hat
and after the refiner. The strength is chosen on some held-out images, and the figures are measured on others.
sampler=NAME and sampler.FIELD=VALUE work as for tools/sample.py.""",
    settings=("dvae.inference.directions.direction_settings:DirectionsConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Compose the words, then find, score, or list."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.evaluation.directions.evaluate_directions import evaluate_directions
    from dvae.inference.directions import DirectionsConfig, find_directions

    settings: DirectionsConfig = compose.tool_settings(compose.compose("directions", own_sampler(argv)))
    if settings.find:
        found = find_directions.find(settings)
        for name, why in found.skipped.items():
            print(f"skipped: {name} {why}")
        print(f"found {len(found.directions)} directions in {found.images} images")
    if settings.score:
        report = evaluate_directions(settings)
        print("\n".join(report.lines()))
        print(f"{settings.out}: these tables; beside it all figures (.json) and strips (.png)")
        return
    for one in find_directions.list_directions(settings):
        share = "" if one.share is None else f"  {100 * one.share:.1f}%"
        print(f"{one.name:<32}{one.method.name:<10}{share}  1 = {one.unit}")


if __name__ == "__main__":
    run_command(command)
