"""What a rank keeps of a model that is trained: weights, gradients, optimiser, averages, buckets, in bytes."""

from __future__ import annotations

from dvae.settings import TrainingConfig

BUCKET = 500_000_000
"""Values that are communicated at once, at most (DeepSpeed's own default)."""
FLOAT = 4
MOMENTS = 2


def bucket(parameters: int) -> int:
    """Values in a communication bucket: never more than there are, or small models would wait on empty gigabytes."""
    return max(1, min(BUCKET, parameters))


def bytes_per_rank(parameters: int, ranks: int, config: TrainingConfig, averages: int = 1) -> tuple[int, int]:
    """Bytes between steps, and when the gradients are there, on each of `ranks` (activations apart).

    Weights, moments and averages are fp32 in both precisions. With ZeRO 1 to 3 the optimiser works on a copy of its
    own part of the weights. Stage 3 keeps its part of the gradients, and its bucket, all the time. Tensors that it
    leaves whole, since they are small (under 100,000 values), are counted as cut.
    """
    whole = FLOAT * parameters
    states = (MOMENTS + averages) * whole
    if config.zero_stage == 0:
        return whole + states, whole + states + whole
    if config.zero_stage < 3:
        kept = whole + (whole + states) // ranks
        return kept, kept + whole // ranks
    kept = (3 * whole + states) // ranks + FLOAT * bucket(parameters)
    return kept, kept
