"""Move images along a direction: python tools/edit.py run=runs/demo direction=NAME strengths=[-2,0,2] out=edits.png"""

from __future__ import annotations

from dvae.errors import run_command
from dvae.tools.sample import own_sampler

USAGE = """usage: python tools/edit.py run=FOLDER direction=NAME [strength=S | strengths=[-2,-1,0,1,2]]
       [images=heldout|drawn|PATH] [n=8] [seed=0] [first=0] [out=edits.png] [vae=BOOL] [original=BOOL]
       [resize=BOOL] [processes=1] [sampler=NAME] [sampler.FIELD=VALUE] [label=NAME] [guidance=1]
       [label_guidance=1] [pca_guidance=1] [classifier_guidance=0] [batch=N]

Adds strength x the direction to the z of each image, and refines with the image's own noise; at strength 0 it is the
reconstruction. direction= is one of those that tools/directions.py has found for the run. strengths= makes a strip of
each image. images=drawn takes the images of the seed as tools/sample.py draws them.
images= are the run's held-out images, or a folder, a zip archive, a .npy (n, H, W, C) or an image file; resize=true
crops and scales those of another size.
A picture shows the image at the left, and with a VAE its images in a row above the refined ones. The other words are
those of tools/sample.py."""


def command(argv: list[str]) -> None:
    """Draw what the words ask for, and say what it took."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    from dvae.config import compose
    from dvae.inference.generation.edit_tasks import EditTask
    from dvae.inference.generation.generate import generate_to_file

    settings = compose.tool_settings(compose.compose("edit", own_sampler(argv)))
    done = generate_to_file(settings, EditTask)
    print(f"{settings.out}: {done.n} edited images, {done}")


if __name__ == "__main__":
    run_command(command)
