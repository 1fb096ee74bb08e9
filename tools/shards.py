"""Build or verify shards: python tools/shards.py build source=folder source.path=DIR size=64 out=shards"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvae.config.command_line import Command
from dvae.errors import UserError, printable_line, run_command
from dvae.utils.package import FOLDER
from dvae.utils.registered_names import registered_in

if TYPE_CHECKING:
    from dvae.data.building.shards_settings import ShardsConfig
    from dvae.data.shards.manifest import Manifest

NAMED = 20
"""Number of damaged images that are listed."""

ABOUT = Command(
    name="shards",
    text=f"""Build WebDataset shards from a source of images, or verify them.

  python tools/shards.py build source=folder source.path=DIR size=64 out=shards     # your own images
  python tools/shards.py build source=avatars source.n=20000 size=32 out=faces      # drawn faces
  python tools/shards.py build source=folder source.path=DIR size=64 out=shards part=0 parts=4
  python tools/shards.py verify shards                                              # check a folder of shards

build renders every image of a source at one size, and writes WebDataset shards with a manifest.
- source= takes a preset, or one of
  {", ".join(registered_in(FOLDER / "registry" / "sources"))}.
  `python tools/components.py source NAME` shows the settings of a source. source.FIELD=VALUE sets them.
- If the command is interrupted, the same command resumes. The shards do not depend on the number of workers.
- Machines that build parts must share the folder. When all parts are built, run the command without part= and parts=:
  it builds the parts that are missing, and publishes the shards.

verify checks counts and hashes. It names every damaged, missing or unknown file.""",
    settings=("dvae.data.building.shards_settings:ShardsConfig",),
    subcommands=("build", "verify"),
    bare_of={"verify": "folder"},
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Do what the first word says with the words after it."""
    argv = ABOUT.arguments(argv)
    if argv[0] == "build":
        build(argv[1:])
    elif argv[0] == "verify":
        verify(argv[1:])
    else:
        raise UserError(f"{argv[0]}: the first word must be build or verify")


def build(words: list[str]) -> None:
    """Build all shards or a part of them, and print the number of images and the speed."""
    from dvae.config import compose
    from dvae.data.building import shard_build as builder
    from dvae.data.building import shard_request, shards_settings
    from dvae.tracking.console import CountedProgress

    composed = compose.compose("shards", words)
    settings: shards_settings.ShardsConfig = compose.tool_settings(composed)
    shard_request.check_part(settings.part, settings.parts)
    how: dict[str, Any] = {
        "heldout_fraction": settings.heldout_fraction,
        "channels": settings.channels,
        "shard_size": settings.shard_size,
        "workers": settings.workers,
        "max_bad_fraction": settings.max_bad_fraction,
    }
    what = (composed.source, settings.size, settings.out)
    start = time.monotonic()
    with CountedProgress("shards") as progress:
        if settings.part is None:
            about = _of_all(settings, builder.build(*what, progress=progress, **how))
        else:
            images = builder.build_part(*what, settings.part, settings.parts, progress=progress, **how)
            about = _of_part(settings, images)
    seconds = time.monotonic() - start
    speed = f"{progress.images} images in {seconds:.1f} s, {progress.images / max(seconds, 1e-9):.3g} images/s"
    about.insert(1, f"  {speed}" if progress.images else "  all of them were there already")
    print("\n".join(about))


def _of_all(settings: ShardsConfig, manifest: Manifest) -> list[str]:
    from dvae.data.shards.manifest import HELDOUT, TRAIN

    train, heldout = manifest.count(TRAIN), manifest.count(HELDOUT)
    return [
        f"{settings.out}: {train + heldout} images of {settings.size}x{settings.size} ({train} train, {heldout} held "
        f"out), {manifest.damaged} damaged",
        *(f"  damaged: {printable_line(damage)[:500]}" for damage in manifest.damaged_first[:NAMED]),
    ]


def _of_part(settings: ShardsConfig, images: int) -> list[str]:
    from dvae.data.shards.manifest import FILE

    lines = [f"{settings.out}: part={settings.part} parts={settings.parts} has {images} images, all made"]
    if not (Path(settings.out) / FILE).exists():
        lines.append("  when all parts are made: the same command without part= and parts= publishes the shards")
    return lines


def verify(words: list[str]) -> None:
    """Check a folder of shards, given as FOLDER or folder=FOLDER."""
    from dvae.data.shards.verify import verify

    if len(words) != 1:
        raise UserError(f"verify takes one folder, not {len(words)} words: python tools/shards.py verify FOLDER")
    folder = words[0].removeprefix("folder=")
    manifest = verify(folder)
    shards = sum(len(split) for split in manifest.splits.values())
    print(
        f"{folder}: {shards} shards are sound, {manifest.count('train')} train and {manifest.count('heldout')} "
        f"held-out images of {manifest.image_size}x{manifest.image_size}"
    )


if __name__ == "__main__":
    run_command(command)
