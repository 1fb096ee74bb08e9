"""Draw the gallery: python tools/gallery.py runs=runs/toy2d density=spirals out=gallery.png"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/gallery.py [runs=runs/toy2d] [density=spirals] [out=gallery.png] [samplers=[ddim,em]]
       [nfe=[5,11,25,99]] [tolerances=[0.1,0.01,0.001,0.0001]] [n=4000] [seed=0] [batch=4000]

Draws what every sampler makes of every run in a folder at the given numbers of network evaluations, with the sliced
Wasserstein distance to the truth below each panel, and writes the figures into a JSON file beside the picture.
Make the runs with `python tools/launch.py recipe=toy2d process=vp`, and again for psld and cld."""


def command(argv: list[str]) -> None:
    """Compose the words, make the gallery, and say where the picture is."""
    from dvae.config import compose
    from dvae.toy2d import gallery

    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    settings: gallery.GalleryConfig = compose.tool_settings(compose.compose("gallery", argv))
    figures = gallery.make_gallery(settings)
    print(f"{settings.out}: {len(figures['cells'])} panels, floor {figures['floor']['mean']:.4f}")


if __name__ == "__main__":
    run_command(command)
