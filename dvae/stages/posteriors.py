"""Posteriors q(z | x) of all training images. The trained encoder computes them once, and the run folder keeps them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dvae.config.schema import Precision, RunConfig
from dvae.data.images import to_float
from dvae.data.shards.reader import Shards
from dvae.models.components import RunModels
from dvae.registry.encoders.base import Encoder, Posterior
from dvae.runs.folder import Run
from dvae.training.batches import open_shards
from dvae.training.resilience.damage_record import record_damage


@torch.no_grad()
def encode_images(config: RunConfig, encoder: Encoder, shards: Shards, start: int, stop: int) -> Iterator[Posterior]:
    """Yield the posteriors of the training images start, ..., stop - 1, in batches of at most evaluate.batch images.

    The encoder runs in the precision of the refiner's training. The results are fp32.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    bf16 = config.training("refiner").precision is Precision.bf16
    for indices in torch.arange(start, stop).split(config.evaluate.batch):
        x = to_float(shards.read(indices.numpy())).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            posterior = encoder.encode(x)
        yield Posterior(posterior.mean.float(), posterior.logvar.float())


def load_posteriors(run: Run, config: RunConfig, models: RunModels) -> Posterior:
    """Return the posteriors of all training images, in the order of the data set.

    If they are not saved yet, they are computed and saved first.
    """
    save_posteriors(run, config, models)
    state = run.load_weights("posteriors")
    return Posterior(state["mean"], state["logvar"])


def save_posteriors(run: Run, config: RunConfig, models: RunModels) -> None:
    """Compute the posteriors and save them in the run folder, unless it already has them."""
    if not run.has_weights("posteriors"):
        shards = open_shards(config, "train")
        parts = list(encode_images(config, models.encoder, shards, 0, len(shards)))
        state = {"mean": torch.cat([p.mean for p in parts]), "logvar": torch.cat([p.logvar for p in parts])}
        record_damage(run.path, shards)
        run.save_weights("posteriors", state)
