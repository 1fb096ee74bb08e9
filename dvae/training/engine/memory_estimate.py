"""Memory of the training state on a rank: weights, gradients, optimizer, averages and buckets, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from dvae.config.schema import TrainingConfig

MAX_BUCKET = 500_000_000
"""Values in a communication bucket, at most (DeepSpeed's own default)."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""Parameters that stage 3 holds in full at a time, at most (DeepSpeed's own default)."""
FLOAT = 4
MOMENTS = 2


def bucket_size(parameters: int) -> int:
    """Values in a communication bucket: never more than there are, or small models would wait on empty gigabytes."""
    return max(1, min(MAX_BUCKET, parameters))


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model on one rank, activations apart. All of it is fp32, in both precisions."""

    weights: int
    """The weights of the network, and the optimizer's own copy of its partition, if it has one."""
    gradients: int
    """At the end of a backward pass."""
    moments: int
    averages: int
    persistent_bucket: int
    """The bucket that stage 3 keeps all the time."""
    transient: int
    """Transient memory: buckets of a reduction, and the weights that stage 3 holds in full."""
    stage: int

    @property
    def between_steps(self) -> int:
        """Bytes between steps. Stage 3 keeps its gradients too."""
        persistent = self.weights + self.moments + self.averages + self.persistent_bucket
        return persistent + self.gradients if self.stage == 3 else persistent

    @property
    def with_gradients(self) -> int:
        """Bytes when all gradients of a step are computed."""
        return self.weights + self.gradients + self.moments + self.averages + self.persistent_bucket

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a backward pass."""
        return self.with_gradients + self.transient


def footprint(parameters: int, ranks: int, config: TrainingConfig, averages: int = 1) -> Footprint:
    """The memory of each of `ranks` for a model with this number of parameters and of averages of its weights.

    With ZeRO 1 to 3 the optimizer works on a copy of its own part of the weights. Stage 3 keeps its part of the
    gradients, and its bucket, all the time. Tensors that it leaves whole, since they are small (under 100,000 values),
    are counted as cut.
    """
    full, stage = FLOAT * parameters, config.zero_stage
    part = full if stage == 0 else full // ranks
    bucket = FLOAT * bucket_size(parameters)
    # stages 1 and 2 copy gradients into a bucket, and that into what is reduced, before their own part is made of it
    buckets = 2 * bucket if config.micro_batches > 1 else max(2 * bucket - part, bucket)
    return Footprint(
        weights=(full, full + part, full + part, 2 * part)[stage],
        gradients=part,
        moments=MOMENTS * part,
        averages=averages * part,
        persistent_bucket=bucket if stage == 3 else 0,
        transient=(bucket if ranks > 1 else 0, buckets, buckets, FLOAT * min(MAX_LIVE_PARAMETERS, parameters))[stage],
        stage=stage,
    )


def bytes_per_rank(parameters: int, ranks: int, config: TrainingConfig, averages: int = 1) -> tuple[int, int]:
    """Bytes between steps, and when the gradients are there, on each of `ranks` (activations apart)."""
    memory = footprint(parameters, ranks, config, averages)
    return memory.between_steps, memory.with_gradients


def bytes_sent(parameters: int, ranks: int, zero: int, micro_batches: int) -> float:
    """Bytes that each rank sends in a step, in rings, fp32; what it receives is as much.

    A ring's gather, or scattered reduction, of S bytes sends S (N - 1) / N; an all-reduce is both. DeepSpeed 0.19
    reduces the gradients of each micro-batch, at stages 0 to 2 by an all-reduce, though stages 1 and 2 keep a part;
    these gather the weights after the step. Stage 3 gathers them for each micro-batch, once where all of them may stay
    until the backward pass, and twice beyond; it reduces in parts (counted in tests/training/test_memory_estimate.py).
    """
    once = FLOAT * parameters * (ranks - 1) / ranks
    if zero == 3:
        return micro_batches * once * (2 if parameters <= MAX_LIVE_PARAMETERS else 3)
    return micro_batches * 2 * once + (once if zero else 0.0)
