"""Verify shards: every file exists with the right length and content, and there are no other files."""

from __future__ import annotations

from pathlib import Path

from dvae.data.shards.manifest import FILE, Manifest, Shard
from dvae.data.shards.shard_index import read_index
from dvae.errors import UserError, fold
from dvae.utils.atomic_files import sha256
from dvae.utils.read import DamagedFile, require_regular


def verify(folder: str | Path) -> Manifest:
    """Verify a folder of shards and return its manifest. Raises UserError that names every bad file."""
    folder = Path(folder)
    manifest = Manifest.load(folder)
    shards = [shard for split in manifest.splits.values() for shard in split]
    problems = [problem for shard in shards for problem in shard_problems(folder, shard)]
    known = {FILE, *(shard.file for shard in shards), *(shard.index for shard in shards)}
    problems += [f"{path.name} does not belong here" for path in sorted(folder.iterdir()) if path.name not in known]
    if problems:
        raise UserError(f"shards at {folder} are damaged: {'; '.join(problems)}")
    return manifest


def shard_problems(folder: Path, shard: Shard, members: int = 2) -> list[str]:
    """Return a description of each problem with a shard and its index. The list is empty if both are intact.

    `members` is the number of files of each sample.
    """
    problems = []
    for name in (shard.file, shard.index):
        path = folder / name
        try:
            size = require_regular(path).st_size
            if name == shard.index:
                read_index(path, shard, members)
            elif size != shard.bytes:
                problems.append(f"{name} is {size} bytes long, not {shard.bytes}")
            elif sha256(path) != shard.sha256:
                problems.append(f"{name} has other content than when it was written")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except DamagedFile as error:
            problems.append(f"{name} {error.reason}")
        except OSError as error:
            problems.append(f"{name} cannot be read ({fold(error)})")
    return problems
