"""Draw parts of images anew: python tools/inpaint.py run=runs/demo mask=left out=inpainted.png"""

from __future__ import annotations

from dvae.errors import run_command
from dvae.tools.sample import own_sampler

USAGE = """usage: python tools/inpaint.py run=FOLDER [mask=border|left|right|top|bottom|center|FILE.png]
       [images=heldout|PATH] [n=8] [seed=0] [first=0] [out=inpainted.png] [vae=BOOL] [original=BOOL]
       [resize=BOOL] [processes=1] [sampler=NAME] [sampler.FIELD=VALUE] [label=NAME] [guidance=1]
       [label_guidance=1] [pca_guidance=1] [classifier_guidance=0] [batch=N]

mask= says what is known and kept, to the bit: left, right, top, bottom (that half), center (the middle), border (all
but the middle), or what is white in a PNG of the run's size. The rest is drawn anew. It needs a sampler that moves all
images in the same steps, and a run whose refiner draws pixels.
images= are the run's held-out images, or a folder, a zip archive, a .npy (n, H, W, C) or an image file; resize=true
crops and scales those of another size.
A picture shows the image, what is known of it, the VAE's image and the inpainted one. The other words are those of
tools/sample.py."""


def command(argv: list[str]) -> None:
    """Draw what the words ask for, and say what it took."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
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
