"""Estimate the memory of the training state on a rank, and the bytes that ranks exchange.

The training state is weights, gradients, optimizer moments, averaged weights and communication buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

from dvae.config.schema import TrainingConfig

MAX_BUCKET = 500_000_000
"""Largest number of values in a communication bucket. It is DeepSpeed's default."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""Largest number of parameters that stage 3 keeps gathered at a time. It is DeepSpeed's default."""
FLOAT = 4
"""Bytes of a value."""
MOMENTS = 2
"""Moments of AdamW per weight."""


def bucket_size(parameters: int) -> int:
    """Number of values in a communication bucket.

    It is never more than the model has. DeepSpeed's default would allocate 2 GB at stage 3 even for a small model.
    """
    return max(1, min(MAX_BUCKET, parameters))


@dataclass(frozen=True)
class Footprint:
    """Bytes of the training state on one rank, without activations. All of it is fp32, in both precisions."""

    weights: int
    """Weights of the network, and the optimizer's own copy of its partition if it has one."""
    gradients: int
    """Gradients at the end of a backward pass."""
    moments: int
    """Moments of AdamW."""
    averages: int
    """Averaged weights (EMA), all of them."""
    persistent_bucket: int
    """The communication bucket, if it is never released (stage 3)."""
    transient: int
    """Memory within a step only: buckets of a reduction, or the weights that stage 3 gathers."""
    stage: int
    """ZeRO stage, 0 to 3."""

    @property
    def between_steps(self) -> int:
        """Bytes between two steps. Stage 3 keeps its gradients, the other stages release them."""
        persistent = self.weights + self.moments + self.averages + self.persistent_bucket
        return persistent + self.gradients if self.stage == 3 else persistent

    @property
    def with_gradients(self) -> int:
        """Bytes after the backward pass, when all gradients exist."""
        return self.weights + self.gradients + self.moments + self.averages + self.persistent_bucket

    @property
    def peak(self) -> int:
        """Largest number of bytes during a backward pass."""
        return self.with_gradients + self.transient


def footprint(parameters: int, ranks: int, config: TrainingConfig, averages: int = 1) -> Footprint:
    """Estimate the memory of a model's training state on each rank.

    At ZeRO 1 to 3 the optimizer works on its own copy of its partition of the weights. Stage 3 also keeps its partition
    of the gradients, and its bucket, between steps. Stage 3 does not partition tensors of fewer than 100,000 values;
    here they are counted as if it did.

    Args:
        parameters: Number of parameters of the model.
        ranks: Number of ranks.
        config: The training settings: ZeRO stage and micro-batches.
        averages: Number of averages of the weights.
    """
    full, stage = FLOAT * parameters, config.zero_stage
    part = full if stage == 0 else full // ranks
    bucket = FLOAT * bucket_size(parameters)
    # Stages 1 and 2 copy the gradients into a bucket, and reduce a copy of the bucket. With one micro-batch, the
    # partition of the gradients is only made afterwards, so its bytes are not used at the same time as both.
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
    """Bytes on each rank between steps, and when all gradients exist, both without activations; see `footprint`."""
    memory = footprint(parameters, ranks, config, averages)
    return memory.between_steps, memory.with_gradients


def bytes_sent(parameters: int, ranks: int, zero: int, micro_batches: int) -> float:
    """Bytes that each rank sends in a step, with ring algorithms and fp32. Each rank receives as many.

    On N ranks, an all-gather or a reduce-scatter of S bytes sends S (N - 1) / N. An all-reduce sends twice as much.
    DeepSpeed 0.19 communicates as follows (tests/training/test_memory_estimate.py counts it):

    - Stages 0 to 2 all-reduce the gradients of each micro-batch, although stages 1 and 2 keep only their partition.
    - Stages 1 and 2 also gather the weights after each step.
    - Stage 3 reduce-scatters the gradients of each micro-batch. It also gathers the weights for each micro-batch: once
      if they may all stay gathered until the backward pass (MAX_LIVE_PARAMETERS), and twice otherwise.
    """
    once = FLOAT * parameters * (ranks - 1) / ranks
    if zero == 3:
        return micro_batches * once * (2 if parameters <= MAX_LIVE_PARAMETERS else 3)
    return micro_batches * 2 * once + (once if zero else 0.0)
