"""Compute the posteriors of many images with the encoder of a run."""

from __future__ import annotations

from typing import Protocol

import torch

from dvae.data.images import to_float
from dvae.inference.batching import CHUNK_SIZE
from dvae.inference.inference_core import InferenceCore
from dvae.registry.encoders.base import Posterior
from dvae.tracking.console import Progress


class ImageReader(Protocol):
    """Images by number: a split of shards, or a user's images."""

    def __len__(self) -> int: ...

    def read(self, numbers: list[int], /) -> torch.Tensor:
        """Read the images with these numbers, (n, C, H, W) uint8."""
        ...


@torch.no_grad()
def encode_posteriors(core: InferenceCore, images: ImageReader, count: int, title: str) -> Posterior:
    """Return the posteriors of the first `count` images, in fp32, on the CPU. `title` names the progress bar."""
    means, logvars = [], []
    with Progress(title, count) as progress:
        for indices in torch.arange(count).split(core.batch or CHUNK_SIZE):
            x = to_float(images.read(indices.tolist())).to(core.device, memory_format=torch.channels_last)
            posterior = core.models.encoder.encode(x)
            means.append(posterior.mean.float().cpu())
            logvars.append(posterior.logvar.float().cpu())
            progress.update(progress.step + len(indices), len(indices))
    return Posterior(torch.cat(means), torch.cat(logvars))
