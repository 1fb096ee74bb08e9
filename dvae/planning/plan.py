"""Calculate memory, step time and GPU-days from the counted operations and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from dvae.config.compose import uses_stream
from dvae.config.schema import Precision, RunConfig, TrainingConfig
from dvae.data.loading.loader import check_batch
from dvae.data.shards.manifest import FILE, TRAIN, Manifest
from dvae.models import components
from dvae.models.components import RunModels
from dvae.planning import counting, passes
from dvae.planning.counting import ForwardPass, Operations, PassCost
from dvae.planning.hardware import GPU, gpu_of
from dvae.planning.plan_settings import PlanConfig
from dvae.registry.encoders.base import Encoder
from dvae.registry.stages.base import STAGES
from dvae.stages.cache import CacheContents, cache_settings
from dvae.stages.encoder import EncoderStage
from dvae.training.engine.ema import ema_names
from dvae.training.engine.memory_estimate import FLOAT, Footprint, bytes_sent, footprint

COUNTED_BATCHES = (2, 4)
"""Images of the two micro-batches to count. A line through both results gives the fixed bytes and bytes per image."""
HEADERS = 2048
"""Bytes of a sample in a shard besides its PNG: two tar headers, the JSON, and padding to blocks of 512 bytes."""
DAY = 86400.0
FROZEN_MODELS = {"encoder": (), "refiner": ("encoder",), "classifier": ("encoder", "refiner")}
"""Stage -> models that are loaded but not trained."""
RECOMPUTES = "checkpoint_blocks"
"""The config field of a component that enables activation checkpointing."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Memory and operations of a forward and a backward pass. Bytes are predictions for a GPU."""

    recomputed: bool
    """Whether activation checkpointing is on: blocks are computed again in the backward pass."""
    kept: int
    """Bytes per image that are saved for the backward pass."""
    passing: int
    """Bytes per image of transient memory at the peak, in addition to `kept`."""
    fixed: int
    """Bytes at the peak that do not depend on the number of images: bf16 weights, the newest gradient of one weight."""
    frozen: Operations
    """Operations per image of the frozen modules."""
    trained: Operations
    """Operations per image of the trained module, forward and backward."""

    def bytes(self, images: int) -> int:
        """Return the bytes of a micro-batch of `images` images at the peak."""
        return self.fixed + images * (self.kept + self.passing)


@dataclass(frozen=True, kw_only=True)
class PlannedModule:
    """A module that a stage trains. Each has its own engine."""

    name: str
    parameters: int
    """Number of parameters."""
    averages: int
    """Number of averaged copies of the weights (EMA)."""
    activations: list[Activations]
    """First with the recipe's activation checkpointing setting, then with the opposite one if the module has it."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Predictions for a training stage at one ZeRO stage."""

    zero: int
    """The ZeRO stage, 0 to 3."""
    states: Footprint
    """Memory of the training state on each GPU."""
    memory: int
    """Peak bytes on each GPU."""
    fits: bool
    """Whether the recipe's micro-batch fits in memory."""
    largest: int
    """Images of the largest micro-batch that fits. 0 if none fits."""
    largest_other: int | None
    """The same with the opposite activation checkpointing setting. None if the module has no such setting."""
    sent: float
    """Bytes that each rank sends in a step."""
    communication: float
    """Seconds of communication in a step."""
    step: float
    """Seconds of a step in total."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Predictions for one training stage of the recipe."""

    name: str
    modules: list[PlannedModule]
    training: TrainingConfig
    micro_batch: int
    """Images in a micro-batch of one rank."""
    frozen: int
    """Bytes of the frozen weights on each GPU."""
    computing: float
    """Seconds of forward and backward passes in a step."""
    optimizer: float
    """Seconds of the optimizer in a step, at the recipe's ZeRO stage."""
    shardings: list[Sharding]
    """Predictions for ZeRO stages 0 to 3."""
    images_per_second: float
    """Images per second that all ranks together read. 0 if the stage reads none."""
    bytes_per_image: float
    """Bytes of an image in a shard."""
    gpu_days: float
    """GPU-days of the whole stage: number of GPUs times days."""

    @property
    def chosen(self) -> Sharding:
        """The prediction for the recipe's ZeRO stage."""
        return self.shardings[self.training.zero_stage]

    @property
    def operations(self) -> Operations:
        """Operations per image, over all modules."""
        return sum((each.activations[0].frozen + each.activations[0].trained for each in self.modules), Operations())


@dataclass(frozen=True, kw_only=True)
class ResourcePlan:
    """Predictions for a recipe."""

    recipe: str
    settings: PlanConfig
    gpu: GPU
    ranks: int
    stages: list[StagePlan]
    given: bool
    """Whether the encoder is taken from elsewhere and not trained."""
    left_out: list[str]
    """Stages that train but that the planner does not support."""
    measured_bytes: bool
    """Whether the bytes per image come from existing shards instead of an assumption."""


def make_plan(config: RunConfig, settings: PlanConfig) -> ResourcePlan:
    """Plan the training stages of a recipe.

    Raises UserError if the GPU is unknown, or a stage's batch is not divisible by ranks times micro-batches.
    """
    gpu, ranks = gpu_of(settings.gpu), settings.nodes * settings.gpus_per_node
    made = components.build_models_on_meta(config)
    adopted = EncoderStage(config).settings.encoder_weights
    given = bool(adopted) or type(made.encoder).pretrained is not Encoder.pretrained
    stages = [name for name in FROZEN_MODELS if name in config.stages]
    left_out = [name for name in STAGES.trained() if name in config.stages and name not in FROZEN_MODELS]
    stages = [name for name in stages if not (name == "encoder" and given)]
    micro = {name: _micro_batch(config, name, ranks) for name in stages}  # raises before the slow counting
    manifest = _manifest(config)
    plans = [_stage(config, settings, gpu, manifest, name, micro[name]) for name in stages]
    return ResourcePlan(
        recipe=config.recipe, settings=settings, gpu=gpu, ranks=ranks, stages=plans,
        given=given and "encoder" in config.stages, left_out=left_out, measured_bytes=manifest is not None,
    )  # fmt: skip


def _micro_batch(config: RunConfig, stage: str, ranks: int) -> int:
    training = config.training(stage)
    return check_batch(training.batch, ranks, training.micro_batches)


def _manifest(config: RunConfig) -> Manifest | None:
    folder = Path(config.data.shards)
    return Manifest.load(folder, config.image_size, config.channels) if (folder / FILE).exists() else None


def _stage(
    config: RunConfig, settings: PlanConfig, gpu: GPU, manifest: Manifest | None, name: str, micro: int
) -> StagePlan:
    training, ranks = config.training(name), settings.nodes * settings.gpus_per_node
    made = components.build_models_on_meta(config)
    frozen = FLOAT * sum(made.parameters()[part] for part in FROZEN_MODELS[name])
    modules = modules_of(config, name, manifest)
    operations = sum((m.activations[0].frozen + m.activations[0].trained for m in modules), Operations())
    computing = training.micro_batches * micro * seconds(operations, gpu, training.precision, settings.efficiency)
    usable = gpu.memory * 1e9 * (1.0 - settings.reserve) - frozen
    shardings = [
        _sharding(settings, gpu, training, ranks, modules, zero, micro, usable, frozen, computing) for zero in range(4)
    ]
    step = shardings[training.zero_stage].step
    size = manifest_bytes(manifest) if manifest else config.channels * config.image_size**2 * settings.packing + HEADERS
    known = name != "encoder" and made.latent_space and not encoder_use(config, made, manifest)[0]
    # A latent diffusion stage reads no images if the latents are cached.
    reads = not known and not uses_stream(config)
    return StagePlan(
        name=name, modules=modules, training=training, micro_batch=micro, frozen=frozen, computing=computing,
        optimizer=_optimizer(modules, training, ranks, gpu), shardings=shardings,
        images_per_second=training.batch / step if reads else 0.0, bytes_per_image=size,
        gpu_days=ranks * training.steps * step / DAY,
    )  # fmt: skip


def manifest_bytes(manifest: Manifest) -> float:
    """Return the mean bytes per image of the training shards."""
    return sum(shard.bytes for shard in manifest.splits[TRAIN]) / manifest.count(TRAIN)


def encoder_use(config: RunConfig, made: RunModels, manifest: Manifest | None) -> tuple[bool, bool]:
    """Return whether the frozen encoder (encodes, decodes) in every step.

    This follows dvae.stages.latent_sources.open_latents.
    If there are no shards yet, it is unknown whether the posteriors fit in data.cache_gib. The encoder is then assumed
    to encode in every step.
    """
    if "cache" in config.stages:
        return False, cache_settings(config).contents is CacheContents.posteriors
    if config.data.flip or "encoder" not in made.trained_parts() or manifest is None:
        return True, True
    size = 2 * FLOAT * manifest.count(TRAIN) * math.prod(made.shapes.latent)
    return size > config.data.cache_gib * 2**30, True


def passes_of(config: RunConfig, stage: str, manifest: Manifest | None) -> dict[str, ForwardPass]:
    """Return the forward passes of a stage, by the name of the module that each trains, on the meta device."""
    made = components.build_models_on_meta(config)
    if stage == "encoder":
        return passes.encoder_passes(made)
    of = passes.refiner_pass if stage == "refiner" else passes.classifier_pass
    return {stage: of(made, *encoder_use(config, made, manifest))}


def modules_of(config: RunConfig, stage: str, manifest: Manifest | None) -> list[PlannedModule]:
    """Count a stage's passes with the recipe's activation checkpointing setting, and with the opposite one if any."""
    training, component = config.training(stage), getattr(config, stage)
    ways = [passes_of(config, stage, manifest)]
    recomputed = [bool(getattr(component, RECOMPUTES, False))]
    if any(field.name == RECOMPUTES for field in fields(component)):
        other = replace(component, **{RECOMPUTES: not recomputed[0]})
        ways.append(passes_of(replace(config, **{stage: other}), stage, manifest))
        recomputed.append(not recomputed[0])
    found = []
    for name, of in ways[0].items():
        counts = [PassCounts.of(way[name], training.precision is Precision.bf16) for way in ways]
        plain = counts[recomputed.index(False)] if False in recomputed else counts[0]
        activations = [count.activations(again, plain) for count, again in zip(counts, recomputed, strict=True)]
        parameters = sum(weight.numel() for weight in of.trained.parameters())
        averages = len(ema_names(training.ema))
        found.append(PlannedModule(name=name, parameters=parameters, averages=averages, activations=activations))
    return found


@dataclass(frozen=True)
class PassCounts:
    """Counts of a forward and a backward pass, one for each size in COUNTED_BATCHES."""

    kept: list[int]
    """Bytes saved for the backward pass, as on a GPU."""
    worked: list[PassCost]
    """Operations and memory, as on a CPU."""

    @classmethod
    def of(cls, one: ForwardPass, bf16: bool) -> PassCounts:
        kept = [counting.saved_bytes(one, images, "cuda", bf16) for images in COUNTED_BATCHES]
        return cls(kept, [counting.count_pass(one, images, bf16) for images in COUNTED_BATCHES])

    def activations(self, recomputed: bool, plain: PassCounts) -> Activations:
        """Convert the counts to bytes and operations per image.

        Transient memory is counted with CPU kernels and scaled by the GPU/CPU ratio of saved activations. The ratio is
        taken from `plain`, the counts without activation checkpointing.
        """
        more = plain.kept[1] / max(1, plain.worked[1].kept)
        kept, kept_fixed = _line(self.kept)
        passing, passing_fixed = _line([more * (worked.peak - worked.kept) for worked in self.worked])
        last, images = self.worked[1], COUNTED_BATCHES[1]
        return Activations(
            recomputed=recomputed, kept=kept, passing=passing, fixed=kept_fixed + passing_fixed,
            frozen=last.frozen.each(images), trained=last.trained.each(images),
        )  # fmt: skip


def _line(values: Sequence[float]) -> tuple[int, int]:
    """Return slope and intercept, at least 0 each, of the line through two values at the sizes COUNTED_BATCHES."""
    slope = max(0.0, (values[1] - values[0]) / (COUNTED_BATCHES[1] - COUNTED_BATCHES[0]))
    return round(slope), round(max(0.0, values[1] - slope * COUNTED_BATCHES[1]))


def seconds(operations: Operations, gpu: GPU, precision: Precision, efficiency: float) -> float:
    """Return the seconds that operations take at a fraction `efficiency` of the GPU's peak.

    In fp32, PyTorch runs convolutions in TF32 and matrix products in full fp32 by default.
    """
    bf16 = precision is Precision.bf16
    convolutions = operations.convolutions / (gpu.bf16 if bf16 else gpu.tf32)
    products = operations.products / (gpu.bf16 if bf16 else gpu.fp32)
    return (convolutions + products) / (1e12 * efficiency)


def bandwidth(settings: PlanConfig, gpu: GPU) -> float:
    """Return the bytes per second and direction of the slowest link of a ring over all ranks."""
    network = gpu.network if settings.network is None else settings.network
    return 1e9 * (gpu.link if settings.nodes == 1 else min(gpu.link, network))


def _optimizer(modules: list[PlannedModule], training: TrainingConfig, ranks: int, gpu: GPU) -> float:
    """Return the seconds of an optimizer step on a rank, from the memory traffic alone.

    Weights, two moments and averages are read and written, and gradients are read. From ZeRO stage 1 on, each rank
    updates its partition only.
    """
    part = ranks if training.zero_stage else 1
    moved = sum(FLOAT * each.parameters * (2 * (3 + each.averages) + 1) for each in modules)
    return moved / part / (1e9 * gpu.bandwidth)


def _sharding(
    settings: PlanConfig, gpu: GPU, training: TrainingConfig, ranks: int, modules: list[PlannedModule], zero: int,
    micro: int, usable: float, frozen: int, computing: float,
) -> Sharding:  # fmt: skip
    at = replace(training, zero_stage=zero)
    each = [footprint(module.parameters, ranks, at, module.averages) for module in modules]
    states = _sum(each)
    free = usable - states.peak
    active = max(module.activations[0].bytes(micro) for module in modules)
    sent = sum(bytes_sent(module.parameters, ranks, zero, training.micro_batches) for module in modules)
    communication = sent / bandwidth(settings, gpu)
    hidden = zero == 3 if settings.overlap is None else settings.overlap
    busy = max(computing, communication) if hidden else computing + communication
    switch = len(modules[0].activations) > 1
    return Sharding(
        zero=zero, states=states, memory=states.peak + frozen + active, fits=active <= free,
        largest=_largest(free, modules, lambda module: module.activations[0]),
        largest_other=_largest(free, modules, lambda module: module.activations[1]) if switch else None,
        sent=sent, communication=communication, step=busy + _optimizer(modules, at, ranks, gpu),
    )  # fmt: skip


def _sum(each: list[Footprint]) -> Footprint:
    """Add the footprints of several engines that use the same ZeRO stage."""
    names = [field.name for field in fields(Footprint) if field.name != "stage"]
    return Footprint(**{name: sum(getattr(one, name) for one in each) for name in names}, stage=each[0].stage)


def _largest(free: float, modules: list[PlannedModule], of: Callable[[PlannedModule], Activations]) -> int:
    """Return the images of the largest micro-batch whose activations fit in `free` bytes, or 0."""
    found = [of(module) for module in modules]
    return max(0, min(math.floor((free - one.fixed) / (one.kept + one.passing)) for one in found))
