"""Shards: python tools/shards.py build source=folder source.path=DIR size=64 out=shards, or verify shards"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.data.shards.manifest import FILE, HELDOUT, TRAIN, Manifest
from dvae.errors import UserError, printable_line, run_command, suggest

NAMED = 20
"""Damaged images that are named."""

USAGE = """usage: python tools/shards.py build source=NAME source.FIELD=VALUE size=64 out=FOLDER [key=value ...]
       python tools/shards.py verify FOLDER

build renders every image of a source at one size and writes WebDataset shards with a manifest.
  source=NAME            {sources}; `python tools/components.py source` lists their fields
  size=32                height and width in pixels
  out=FOLDER             appears when it is complete; the same command again goes on where it was stopped
  heldout_fraction=0.1            share of the images kept from training
  channels=3             3 (RGB) or 1 (gray)
  workers=2              processes that render; the shards do not depend on it
  shard_size=10000       images of the source of which a train and a held-out shard are made
  max_bad_fraction=0.01  damaged images are named and passed over up to this share
  plugins=[my_module]    import modules that register sources
  part=0 parts=4         make only the first (0, ..., 3) of 4 parts, beside others, on machines that share the folder's
                         place; when all have ended, the same command without them makes what is missing and publishes
verify checks counts and hashes, and names every damaged, missing or foreign file."""


@dataclass(kw_only=True, slots=True)
class ShardsConfig:
    """What `build` takes."""

    source: Any = MISSING
    """Where the images come from."""
    size: int = 32
    """Height and width in pixels."""
    out: str = MISSING
    """Folder of the shards."""
    heldout_fraction: float = 0.1
    """Share of the images kept from training."""
    channels: int = 3
    """1 or 3."""
    shard_size: int = 10_000
    """Images of the source of which a train and a held-out shard are made."""
    workers: int = 2
    """Processes that render."""
    max_bad_fraction: float = 0.01
    """Damaged images are named and passed over up to this share."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""
    part: int | None = None
    """Make only this part (0 is the first) of `parts`, and publish nothing; null: all."""
    parts: int = 1
    """How many parts are made, each by a command of its own."""


ConfigStore.instance().store(name="shards_schema", node=ShardsConfig, provider="dvae")


def command(argv: list[str]) -> None:
    """Do what the first word says with the words after it."""
    from dvae.registry.sources.base import SOURCES

    if not argv or any(word in ("-h", "--help") for word in argv):
        print(USAGE.format(sources=", ".join(SOURCES.names())))
    elif argv[0] == "build":
        build(argv[1:])
    elif argv[0] == "verify":
        verify(argv[1:])
    else:
        raise UserError(f"unknown word {argv[0]!r}: {suggest(argv[0], ['build', 'verify'])}")


def build(words: list[str]) -> None:
    """Compose the words, build all or a part, and tell how many images there are and how fast they came."""
    from dvae.config import compose
    from dvae.data.building import shard_build as builder
    from dvae.data.building import shard_request
    from dvae.tracking.console import CountedProgress

    composed = compose.compose("shards", words)
    settings: ShardsConfig = compose.tool_settings(composed)
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
    train, heldout = manifest.count(TRAIN), manifest.count(HELDOUT)
    return [
        f"{settings.out}: {train + heldout} images of {settings.size}x{settings.size} ({train} train, {heldout} held "
        f"out), {manifest.damaged} damaged",
        *(f"  damaged: {printable_line(damage)[:500]}" for damage in manifest.damaged_first[:NAMED]),
    ]


def _of_part(settings: ShardsConfig, images: int) -> list[str]:
    lines = [f"{settings.out}: part={settings.part} parts={settings.parts} has {images} images, all made"]
    if not (Path(settings.out) / FILE).exists():
        lines.append("  when all parts are made: the same command without part= and parts= publishes the shards")
    return lines


def verify(words: list[str]) -> None:
    """Check a folder of shards."""
    from dvae.data.shards.verify import verify

    if len(words) != 1:
        raise UserError(f"verify takes one folder, not {len(words)} words: python tools/shards.py verify FOLDER")
    manifest = verify(words[0])
    shards = sum(len(split) for split in manifest.splits.values())
    print(
        f"{words[0]}: {shards} shards are sound, {manifest.count('train')} train and {manifest.count('heldout')} "
        f"held-out images of {manifest.image_size}x{manifest.image_size}"
    )


if __name__ == "__main__":
    run_command(command)
