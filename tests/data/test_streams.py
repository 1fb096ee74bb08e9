"""The loader of an endless source: numbered samples, cut among ranks and micro-batches as by the other loader."""

from __future__ import annotations

import pytest
import torch

from dvae.data.loading.streams import StreamLoader
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES

SOURCE = SOURCES.build({"name": "toy2d"}, Shapes(image_size=1, channels=2))


def test_a_step_is_the_source_at_its_numbers() -> None:
    with StreamLoader(SOURCE, 8, seed=5) as loader:
        (batch,) = loader.step(24)
    x, labels = SOURCE.sample(5, range(24, 32))
    assert batch.keys.tolist() == batch.indices.tolist() == list(range(24, 32))
    assert torch.equal(batch.images, x)
    assert batch.to_float() is batch.images
    assert batch.labels is not None
    assert torch.equal(batch.labels, labels)
    assert labels.tolist() == [n % 6 for n in range(24, 32)]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 2), (4, 1), (3, 4)])
def test_ranks_and_micro_batches_share_a_step(world: int, accumulate: int) -> None:
    (whole,) = StreamLoader(SOURCE, 24).step(48)
    parts = [StreamLoader(SOURCE, 24, rank=r, world=world, accumulate=accumulate).step(48) for r in range(world)]
    in_order = [parts[r][a] for a in range(accumulate) for r in range(world)]
    assert torch.equal(torch.cat([part.keys for part in in_order]), whole.keys)
    assert torch.equal(torch.cat([part.images for part in in_order]), whole.images)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="use 9 or 12"):
        StreamLoader(SOURCE, 10, world=3)
