"""Verification names every damaged, missing and foreign file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvae.data.shards.verify import verify
from dvae.errors import UserError


def test_sound_shards_pass(shards: Path):
    assert verify(shards).count("train") > 0


def test_every_damage_is_named(shards: Path):
    flipped = bytearray((shards / "train-000000.tar").read_bytes())
    flipped[1500] ^= 1
    (shards / "train-000000.tar").write_bytes(flipped)
    (shards / "train-000001.tar").write_bytes(b"short")
    (shards / "train-000002.tar").unlink()
    (shards / "train-000003.npy").write_bytes(b"other")
    (shards / "heldout-000000.npy").unlink()
    (shards / "foreign.txt").write_text("x")
    with pytest.raises(UserError) as error:
        verify(shards)
    text = str(error.value)
    for said in (
        "train-000000.tar has other content",
        "train-000001.tar is 5 bytes long",
        "train-000002.tar is missing",
        "train-000003.npy has other content",
        "heldout-000000.npy is missing",
        "foreign.txt does not belong here",
    ):
        assert said in text
    assert text.count(";") == 5
