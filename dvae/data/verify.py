"""Verifying shards: every file is there, of the right length and content, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dvae.data.manifest import FILE, Manifest, Shard
from dvae.errors import UserError, one_line
from dvae.files import sha256


def verify(folder: str | Path) -> Manifest:
    """The manifest of a folder of shards in which all is well. Raises UserError naming every file that is not."""
    folder = Path(folder)
    manifest = Manifest.load(folder)
    shards = [shard for split in manifest.splits.values() for shard in split]
    problems = [problem for shard in shards for problem in faults(folder, shard)]
    known = {FILE, *(shard.file for shard in shards), *(shard.index for shard in shards)}
    problems += [f"{path.name} does not belong here" for path in sorted(folder.iterdir()) if path.name not in known]
    if problems:
        raise UserError(f"shards at {folder} are damaged: {'; '.join(problems)}")
    return manifest


def faults(folder: Path, shard: Shard) -> list[str]:
    """What is wrong with a shard and its index; nothing where they are what they were."""
    problems = []
    for name, digest in ((shard.file, shard.sha256), (shard.index, shard.index_sha256)):
        path = folder / name
        try:
            size = path.stat().st_size
            if name == shard.file and size != shard.bytes:
                problems.append(f"{name} is {size} bytes long, not {shard.bytes}")
            elif sha256(path) != digest:
                problems.append(f"{name} has other content than when it was written")
            elif name == shard.index and len(np.load(path)) != shard.count:
                problems.append(f"{name} lists {len(np.load(path))} images, not {shard.count}")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({one_line(error)})")
    return problems
