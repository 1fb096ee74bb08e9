"""Ranges of activations, seen while a run draws images: on its own trajectories, over all of the time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.inference.pipeline import Pipeline
from dvae.models.quantization.integer_layer import TimeBucket
from dvae.models.quantization.trace import watch_inputs


@dataclass(frozen=True)
class ActivationRanges:
    """Least and greatest input of a layer, (buckets + 1,) each, fp32; the last is over all of the time."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def empty(cls, buckets: int) -> ActivationRanges:
        return cls(torch.full((buckets + 1,), torch.inf), torch.full((buckets + 1,), -torch.inf))

    def widen(self, x: torch.Tensor, bucket: int) -> None:
        """Widen the range of a bucket, and that of all, to hold x."""
        least, most = x.amin().float().cpu(), x.amax().float().cpu()
        for place in {bucket, len(self.low) - 1}:
            self.low[place] = torch.minimum(self.low[place], least)
            self.high[place] = torch.maximum(self.high[place], most)

    def filled(self) -> ActivationRanges:
        """With the range of all of the time where nothing was seen."""
        unseen = self.low > self.high
        return ActivationRanges(
            torch.where(unseen, self.low[-1], self.low), torch.where(unseen, self.high[-1], self.high)
        )


def calibrate_ranges(
    pipeline: Pipeline, names: list[str], buckets: int, n: int, seed: int
) -> dict[str, ActivationRanges]:
    """Ranges of the inputs of the denoiser's layers `names` while n images of the seed are drawn by its sampler."""
    denoiser, time_bucket = pipeline.models.denoiser, TimeBucket(buckets)
    found = {name: ActivationRanges.empty(buckets) for name in names}
    hook = denoiser.refiner.register_forward_pre_hook(time_bucket.observe)
    try:
        layers = {name: denoiser.get_submodule(name) for name in names}
        with watch_inputs(layers, lambda name, x: found[name].widen(x, time_bucket.bucket)):
            pipeline.generate(n, seed)
    finally:
        hook.remove()
    return {name: ranges.filled() for name, ranges in found.items()}
