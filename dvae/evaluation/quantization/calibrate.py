"""Measure the ranges of activations while a run draws images, so on its own sampling trajectories."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.inference.pipeline import Pipeline
from dvae.models.quantization.integer_layer import TimeBucket
from dvae.models.quantization.trace import watch_inputs


@dataclass(frozen=True)
class ActivationRanges:
    """Minimum and maximum of a layer's inputs, (buckets + 1,) fp32 each.

    There is one entry for each bucket of the diffusion time, and a last one over all times.
    """

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def empty(cls, buckets: int) -> ActivationRanges:
        """Ranges before any input: minimum infinity, maximum minus infinity."""
        return cls(torch.full((buckets + 1,), torch.inf), torch.full((buckets + 1,), -torch.inf))

    def widen(self, x: torch.Tensor, bucket: int) -> None:
        """Widen the range of a bucket, and the range over all times, so that they include the values of x."""
        least, most = x.amin().float().cpu(), x.amax().float().cpu()
        for place in {bucket, len(self.low) - 1}:
            self.low[place] = torch.minimum(self.low[place], least)
            self.high[place] = torch.maximum(self.high[place], most)

    def filled(self) -> ActivationRanges:
        """Replace the ranges of buckets without inputs by the range over all times."""
        unseen = self.low > self.high
        return ActivationRanges(
            torch.where(unseen, self.low[-1], self.low), torch.where(unseen, self.high[-1], self.high)
        )


def calibrate_ranges(
    pipeline: Pipeline, names: list[str], buckets: int, n: int, seed: int
) -> dict[str, ActivationRanges]:
    """Measure the input ranges of the denoiser's layers `names` while the sampler draws n images of a seed.

    Returns the ranges by name of the layer. `buckets` is the number of buckets of the diffusion time.
    """
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
