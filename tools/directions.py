"""Directions of a run's latent space: python tools/directions.py run=runs/demo find=[labels,pca,jacobian] score=true"""

from __future__ import annotations

from dvae.errors import run_command
from dvae.tools.sample import own_sampler

USAGE = """usage: python tools/directions.py run=FOLDER [find=[labels,pca,jacobian]] [labels=[NAME,...]]
       [components=8] [n_train=20000] [jacobians=64] [shards=FOLDER] [seed=0] [batch=64]
       [score=true [directions=[NAME,...]] [strengths=[0.75,1,1.5,3]] [validation=60] [n=150]
       [recognizer_steps=2000] [recognizer_batch=64] [out=directions.md] [sampler=NAME] [sampler.FIELD=VALUE]]

find= finds directions in the latents of the training images and keeps them with the run, for tools/edit.py: one to each
value of each attribute that the images are labeled with (labels), the principal components (pca), and what moves the
decoder's image most (jacobian). Without it those that the run has are listed.
score=true trains a judge on the labeled real images and says, in tables, what each direction turns on and what else
it changes, in x_hat and after the refiner; the strength is chosen on some held-out images, the figures are others'."""


def command(argv: list[str]) -> None:
    """Compose the words, then find, score, or list."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
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
