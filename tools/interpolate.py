"""Interpolate between images: python tools/interpolate.py run=runs/demo n=4 space=z out=strips.png"""

from __future__ import annotations

from dvae.errors import run_command
from dvae.tools.sample import own_sampler

USAGE = """usage: python tools/interpolate.py run=FOLDER [images=heldout|drawn|PATH] [space=z|noise|both] [steps=8]
       [n=8] [seed=0] [first=0] [out=interpolations.png] [vae=BOOL] [original=BOOL] [resize=BOOL] [processes=1]
       [sampler=NAME] [sampler.FIELD=VALUE] [label=NAME] [guidance=1] [label_guidance=1] [pca_guidance=1]
       [classifier_guidance=0]
       [batch=N]

Strip k goes from image 2 k to image 2 k + 1 in `steps` images, both ends among them. space=z moves z alone, with the
noise of the first image (in a straight line, where the prior is N(0, I) along the arc); space=noise moves the noise
alone along the arc, with the z of the first; both moves both. images=drawn takes the images of the seed as
tools/sample.py draws them: strip k from 2 k to 2 k + 1. In latent space, and without an encoder, images=drawn
space=noise.
images= are the run's held-out images, or a folder, a zip archive, a .npy (n, H, W, C) or an image file; resize=true
crops and scales those of another size.
A picture shows the images at the ends of each strip, and with a VAE its images in a row above the refined ones. The
other words are those of tools/sample.py."""


def command(argv: list[str]) -> None:
    """Draw what the words ask for, and say what it took."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    from dvae.config import compose
    from dvae.inference.generation.edit_tasks import InterpolateTask
    from dvae.inference.generation.generate import generate_to_file

    settings = compose.tool_settings(compose.compose("interpolate", own_sampler(argv)))
    done = generate_to_file(settings, InterpolateTask)
    print(f"{settings.out}: {done.n} strips, {done}")


if __name__ == "__main__":
    run_command(command)
