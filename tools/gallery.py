"""Draw the gallery of samplers: python tools/gallery.py runs=runs/toy2d density=spirals"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="gallery",
    text="""Draw points in the plane with every sampler, from every run in a folder, at several numbers of evaluations.

  python tools/launch.py recipe=toy2d process=vp          # first make the runs; also process=psld and process=cld
  python tools/gallery.py runs=runs/toy2d                 # gallery.png, and its figures in gallery.json
  python tools/gallery.py runs=runs/toy2d density=spirals samplers=[ddim,em] nfe=[5,25] out=spirals.png

The number below each panel is the sliced Wasserstein distance to the true density.""",
    settings=("dvae.toy2d.gallery:GalleryConfig",),
    bare="runs",
)


def command(argv: list[str]) -> None:
    """Compose the words, make the gallery, and say where the picture is."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.toy2d import gallery

    settings: gallery.GalleryConfig = compose.tool_settings(compose.compose("gallery", argv))
    figures = gallery.make_gallery(settings)
    print(f"{settings.out}: {len(figures['cells'])} panels, floor {figures['floor']['mean']:.4f}")


if __name__ == "__main__":
    run_command(command)
