"""What a rank keeps of a model that is trained: weights, gradients, optimizer, averages, buckets, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from dvae.config.schema import TrainingConfig

BUCKET = 500_000_000
"""Values that are communicated at once, at most (DeepSpeed's own default)."""
GATHERED = 1_000_000_000
"""Values of the weights that stage 3 has whole at a time, at most (DeepSpeed's own default)."""
FLOAT = 4
MOMENTS = 2


def bucket(parameters: int) -> int:
    """Values in a communication bucket: never more than there are, or small models would wait on empty gigabytes."""
    return max(1, min(BUCKET, parameters))


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model on one rank, activations apart. All of it is fp32, in both precisions."""

    weights: int
    """What the network computes with, and the part of them that the optimizer works on where that is a copy."""
    gradients: int
    """When all of a step's are there."""
    moments: int
    averages: int
    kept_bucket: int
    """Stage 3 keeps its bucket all the time."""
    passing: int
    """What comes and goes between: buckets of a reduction, the weights that stage 3 has whole."""
    stage: int

    @property
    def between(self) -> int:
        """Between steps; stage 3 has its gradients then too."""
        kept = self.weights + self.moments + self.averages + self.kept_bucket
        return kept + self.gradients if self.stage == 3 else kept

    @property
    def full(self) -> int:
        """When the gradients are there."""
        return self.weights + self.gradients + self.moments + self.averages + self.kept_bucket

    @property
    def peak(self) -> int:
        """At the worst moment of a backward pass."""
        return self.full + self.passing


def footprint(parameters: int, ranks: int, config: TrainingConfig, averages: int = 1) -> Footprint:
    """What each of `ranks` has of a model of so many parameters, with so many averages of its weights.

    With ZeRO 1 to 3 the optimizer works on a copy of its own part of the weights. Stage 3 keeps its part of the
    gradients, and its bucket, all the time. Tensors that it leaves whole, since they are small (under 100,000 values),
    are counted as cut.
    """
    whole, stage = FLOAT * parameters, config.zero_stage
    part = whole if stage == 0 else whole // ranks
    flat = FLOAT * bucket(parameters)
    # stages 1 and 2 copy gradients into a bucket, and that into what is reduced, before their own part is made of it
    two = 2 * flat if config.micro_batches > 1 else max(2 * flat - part, flat)
    return Footprint(
        weights=(whole, whole + part, whole + part, 2 * part)[stage],
        gradients=part,
        moments=MOMENTS * part,
        averages=averages * part,
        kept_bucket=flat if stage == 3 else 0,
        passing=(flat if ranks > 1 else 0, two, two, FLOAT * min(GATHERED, parameters))[stage],
        stage=stage,
    )


def bytes_per_rank(parameters: int, ranks: int, config: TrainingConfig, averages: int = 1) -> tuple[int, int]:
    """Bytes between steps, and when the gradients are there, on each of `ranks` (activations apart)."""
    found = footprint(parameters, ranks, config, averages)
    return found.between, found.full


def bytes_sent(parameters: int, ranks: int, zero: int, micro_batches: int) -> float:
    """Bytes that each rank sends in a step, in rings, fp32; what it receives is as much.

    A ring's gather, or scattered reduction, of S bytes sends S (N - 1) / N; an all-reduce is both. DeepSpeed 0.19
    reduces the gradients of each micro-batch, at stages 0 to 2 by an all-reduce, though stages 1 and 2 keep a part;
    these gather the weights after the step. Stage 3 gathers them for each micro-batch, once where all of them may stay
    until the backward pass, and twice beyond; it reduces in parts (counted in tests/training/test_footprint.py).
    """
    once = FLOAT * parameters * (ranks - 1) / ranks
    if zero == 3:
        return micro_batches * once * (2 if parameters <= GATHERED else 3)
    return micro_batches * 2 * once + (once if zero else 0.0)
