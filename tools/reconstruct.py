"""Reconstruct images: python tools/reconstruct.py run=runs/demo n=8 out=reconstructions.png"""

from __future__ import annotations

from dvae.errors import run_command
from dvae.tools.sample import own_sampler

USAGE = """usage: python tools/reconstruct.py run=FOLDER [images=heldout|PATH] [n=8] [seed=0] [first=0]
       [out=reconstructions.png] [vae=BOOL] [original=BOOL] [resize=BOOL] [processes=1] [sampler=NAME]
       [sampler.FIELD=VALUE] [label=NAME] [guidance=1] [label_guidance=1] [pca_guidance=1] [classifier_guidance=0]
       [batch=N]

Encodes images, decodes the posterior mean z and refines what the decoder makes; in latent space the decoder's image is
the result. A picture (out=NAME.png) shows the image, the VAE's reconstruction and the refined one; out=NAME/, NAME.npy,
NAME.zip and NAME.tar hold the refined ones, with original=true vae=true all three side by side.
images= are the run's held-out images, or a folder, a zip archive, a .npy (n, H, W, C) or an image file; resize=true
crops and scales those of another size. n is then null: all of them.
Image k has noise k of the seed, and the same bits on the CPU, however many are asked for and by however many processes;
the same command again goes on where it was ended. The other words are those of tools/sample.py."""


def command(argv: list[str]) -> None:
    """Draw what the words ask for, and say what it took."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    from dvae.config import compose
    from dvae.inference.generation.edit_tasks import ReconstructTask
    from dvae.inference.generation.generate import generate_to_file

    settings = compose.tool_settings(compose.compose("reconstruct", own_sampler(argv)))
    done = generate_to_file(settings, ReconstructTask)
    print(f"{settings.out}: {done.n} reconstructions, {done}")


if __name__ == "__main__":
    run_command(command)
