"""The arithmetic: from what was counted to memory, time and days on so many GPUs."""

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
"""Images of the two micro-batches that are counted: bytes are so much whatever their number, and so much for each."""
HEADERS = 2048
"""Bytes of a sample in a shard besides its PNG: two headers, the JSON, and what fills up blocks of 512."""
DAY = 86400.0
FROZEN_MODELS = {"encoder": (), "refiner": ("encoder",), "classifier": ("encoder", "refiner")}
"""Stage -> models that are there, and not trained."""
RECOMPUTES = "checkpoint_blocks"
"""The field of a component that switches activation checkpointing."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a forward and a backward pass take; bytes are those of a GPU unless said otherwise."""

    recomputed: bool
    """Whether blocks are computed again for the gradient (activation checkpointing)."""
    kept: int
    """Bytes kept for the gradient, of each image."""
    passing: int
    """Bytes at the worst moment beyond those, of each image."""
    fixed: int
    """Bytes at the worst moment whatever the number of images: weights in bf16, the newest gradient of one."""
    frozen: Operations
    """Of each image, of what is not trained."""
    trained: Operations
    """Of each image, forward and backward."""

    def bytes(self, images: int) -> int:
        """Of a micro-batch, at the worst moment."""
        return self.fixed + images * (self.kept + self.passing)


@dataclass(frozen=True, kw_only=True)
class PlannedModule:
    """A module that a stage trains, with an engine of its own."""

    name: str
    parameters: int
    averages: int
    activations: list[Activations]
    """As the recipe has it, then the other way, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """A stage at one ZeRO stage."""

    zero: int
    states: Footprint
    memory: int
    """Bytes on each GPU, at the worst moment."""
    fits: bool
    largest: int
    """The largest micro-batch that fits (0: none does)."""
    largest_other: int | None
    """The same with activation checkpointing the other way; None where there is no such switch."""
    sent: float
    """Bytes that each rank sends in a step."""
    communication: float
    """Seconds of a step."""
    step: float
    """Seconds."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage of the recipe takes."""

    name: str
    modules: list[PlannedModule]
    training: TrainingConfig
    micro_batch: int
    """Images of a rank at a time."""
    frozen: int
    """Bytes of weights that are there and not trained."""
    computing: float
    """Seconds of a step."""
    optimizer: float
    """Seconds of a step at the recipe's ZeRO stage, on a rank."""
    shardings: list[Sharding]
    """ZeRO 0 to 3."""
    images_per_second: float
    """That are read for it, over all ranks (0: none are)."""
    bytes_per_image: float
    gpu_days: float

    @property
    def chosen(self) -> Sharding:
        return self.shardings[self.training.zero_stage]

    @property
    def operations(self) -> Operations:
        """Of each image."""
        return sum((each.activations[0].frozen + each.activations[0].trained for each in self.modules), Operations())


@dataclass(frozen=True, kw_only=True)
class ResourcePlan:
    """What a recipe takes."""

    recipe: str
    settings: PlanConfig
    gpu: GPU
    ranks: int
    stages: list[StagePlan]
    given: bool
    """The encoder is taken over as it is."""
    left_out: list[str]
    """Stages that train, and that the planner does not know."""
    measured_bytes: bool
    """Bytes per image are those of shards that exist."""


def make_plan(config: RunConfig, settings: PlanConfig) -> ResourcePlan:
    """Plan the recipe's trainings. Raises UserError for a GPU that is not known, or a batch that does not divide."""
    gpu, ranks = gpu_of(settings.gpu), settings.nodes * settings.gpus_per_node
    made = components.build_models_on_meta(config)
    adopted = EncoderStage(config).settings.encoder_weights
    given = bool(adopted) or type(made.encoder).pretrained is not Encoder.pretrained
    stages = [name for name in FROZEN_MODELS if name in config.stages]
    left_out = [name for name in STAGES.trained() if name in config.stages and name not in FROZEN_MODELS]
    stages = [name for name in stages if not (name == "encoder" and given)]
    micro = {name: _micro_batch(config, name, ranks) for name in stages}  # refused before anything is counted
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
    # no image is read if latents alone are diffused and they are known
    reads = not known and not uses_stream(config)
    return StagePlan(
        name=name, modules=modules, training=training, micro_batch=micro, frozen=frozen, computing=computing,
        optimizer=_optimizer(modules, training, ranks, gpu), shardings=shardings,
        images_per_second=training.batch / step if reads else 0.0, bytes_per_image=size,
        gpu_days=ranks * training.steps * step / DAY,
    )  # fmt: skip


def manifest_bytes(manifest: Manifest) -> float:
    """Bytes of a shard per image."""
    return sum(shard.bytes for shard in manifest.splits[TRAIN]) / manifest.count(TRAIN)


def encoder_use(config: RunConfig, made: RunModels, manifest: Manifest | None) -> tuple[bool, bool]:
    """Whether the frozen encoder encodes, and decodes, in every step (dvae.stages.latent_sources.open_latents).

    Where there are no shards yet, that the posteriors would fit into data.cache_gib is not known: it encodes.
    """
    if "cache" in config.stages:
        return False, cache_settings(config).contents is CacheContents.posteriors
    if config.data.flip or "encoder" not in made.trained_parts() or manifest is None:
        return True, True
    size = 2 * FLOAT * manifest.count(TRAIN) * math.prod(made.shapes.latent)
    return size > config.data.cache_gib * 2**30, True


def passes_of(config: RunConfig, stage: str, manifest: Manifest | None) -> dict[str, ForwardPass]:
    """The passes of a stage, by the module that each trains, on meta."""
    made = components.build_models_on_meta(config)
    if stage == "encoder":
        return passes.encoder_passes(made)
    of = passes.refiner_pass if stage == "refiner" else passes.classifier_pass
    return {stage: of(made, *encoder_use(config, made, manifest))}


def modules_of(config: RunConfig, stage: str, manifest: Manifest | None) -> list[PlannedModule]:
    """Count a stage's passes, as the recipe has them and with activation checkpointing the other way."""
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
    """What was counted of a pass, for the micro-batches of COUNTED images."""

    kept: list[int]
    """Bytes, as a GPU has them."""
    worked: list[PassCost]

    @classmethod
    def of(cls, one: ForwardPass, bf16: bool) -> PassCounts:
        kept = [counting.saved_bytes(one, images, "cuda", bf16) for images in COUNTED_BATCHES]
        return cls(kept, [counting.count_pass(one, images, bf16) for images in COUNTED_BATCHES])

    def activations(self, recomputed: bool, plain: PassCounts) -> Activations:
        """What passes was counted as a CPU has it: a GPU is taken to have as much more as it keeps more of `plain`."""
        more = plain.kept[1] / max(1, plain.worked[1].kept)
        kept, kept_fixed = _line(self.kept)
        passing, passing_fixed = _line([more * (worked.peak - worked.kept) for worked in self.worked])
        last, images = self.worked[1], COUNTED_BATCHES[1]
        return Activations(
            recomputed=recomputed, kept=kept, passing=passing, fixed=kept_fixed + passing_fixed,
            frozen=last.frozen.each(images), trained=last.trained.each(images),
        )  # fmt: skip


def _line(values: Sequence[float]) -> tuple[int, int]:
    """Slope and start, neither below 0, of the line through values at COUNTED."""
    slope = max(0.0, (values[1] - values[0]) / (COUNTED_BATCHES[1] - COUNTED_BATCHES[0]))
    return round(slope), round(max(0.0, values[1] - slope * COUNTED_BATCHES[1]))


def seconds(operations: Operations, gpu: GPU, precision: Precision, efficiency: float) -> float:
    """Time of operations at a share of the peak; PyTorch's fp32 convolutions are TF32, its matrix products are not."""
    bf16 = precision is Precision.bf16
    convolutions = operations.convolutions / (gpu.bf16 if bf16 else gpu.tf32)
    products = operations.products / (gpu.bf16 if bf16 else gpu.fp32)
    return (convolutions + products) / (1e12 * efficiency)


def bandwidth(settings: PlanConfig, gpu: GPU) -> float:
    """Bytes per second of the slowest link of a ring over all ranks."""
    network = gpu.network if settings.network is None else settings.network
    return 1e9 * (gpu.link if settings.nodes == 1 else min(gpu.link, network))


def _optimizer(modules: list[PlannedModule], training: TrainingConfig, ranks: int, gpu: GPU) -> float:
    """Seconds: weights, moments and averages are read and written, gradients read; nothing else is slow."""
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
    """Of several engines together; their stages are one."""
    names = [field.name for field in fields(Footprint) if field.name != "stage"]
    return Footprint(**{name: sum(getattr(one, name) for one in each) for name in names}, stage=each[0].stage)


def _largest(free: float, modules: list[PlannedModule], of: Callable[[PlannedModule], Activations]) -> int:
    """Images of the largest micro-batch whose activations fit into `free` bytes."""
    found = [of(module) for module in modules]
    return max(0, min(math.floor((free - one.fixed) / (one.kept + one.passing)) for one in found))
