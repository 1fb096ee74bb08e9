"""Format a plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from typing import Any

from dvae.planning.plan import Activations, ResourcePlan, StagePlan, bandwidth
from dvae.utils.text_tables import aligned_lines

GIB = 2**30


def format_plan(plan: ResourcePlan) -> str:
    """Return the whole plan as text."""
    settings = plan.settings
    lines = [
        f"{plan.recipe} on {settings.nodes} x {settings.gpus_per_node} {settings.gpu} ({plan.ranks} ranks): all of it "
        "is predicted, and nothing was measured on a GPU"
    ]
    if plan.given:
        lines += ["", "encoder: taken from elsewhere, not trained"]
    if plan.left_out:
        lines += ["", f"{', '.join(plan.left_out)}: not planned"]
    for stage in plan.stages:
        lines += ["", *_stage(stage, plan)]
    days = sum(stage.gpu_days for stage in plan.stages)
    lines += ["", f"whole recipe (predicted): {_days(days, plan.ranks)}", "", *assumptions(plan)]
    return "\n".join(lines)


def _days(days: float, ranks: int) -> str:
    hours = 24 * days / ranks
    return f"{days:.3g} GPU-days, {hours:.3g} wall-clock hours"


def _stage(stage: StagePlan, plan: ResourcePlan) -> list[str]:
    training = stage.training
    sizes = " + ".join(f"{module.parameters / 1e6:.1f}M" for module in stage.modules)
    names = " + ".join(module.name for module in stage.modules)
    operations = stage.operations
    lines = [
        f"{names}: {sizes} parameters; {training.steps} steps of {training.batch} images, {stage.micro_batch} per "
        f"micro-batch (micro_batches={training.micro_batches}), {training.precision.name}",
        f"  {operations.total / 1e9:.4g} GFLOP per image, forward and backward, including "
        f"{sum(m.activations[0].frozen.total for m in stage.modules) / 1e9:.4g} of frozen modules",
    ]
    for module in stage.modules:
        lines += [_activations(module.name, one, stage.micro_batch) for one in module.activations]
    if stage.frozen:
        lines.append(f"  frozen weights {_gib(stage.frozen)} GiB")
    lines += ["", *_table(stage), ""]
    step = stage.chosen.step
    lines.append(
        f"  predicted at ZeRO {training.zero_stage}: {1000 * step:.3g} ms per step (computing "
        f"{1000 * stage.computing:.3g}, communication {1000 * stage.chosen.communication:.3g}, optimizer "
        f"{1000 * stage.optimizer:.2g}), {training.batch / step:.4g} images/s"
    )
    lines.append(_data(stage, plan.settings.nodes))
    lines.append(f"  {_days(stage.gpu_days, plan.ranks)}")
    return lines


def _activations(name: str, one: Activations, images: int) -> str:
    how = "with" if one.recomputed else "without"
    return (
        f"  activations of {name} {how} checkpointing: {_gib(one.bytes(images))} GiB per micro-batch of {images} "
        f"(per image: {_gib(one.kept)} saved, {_gib(one.passing)} transient; fixed: {_gib(one.fixed)})"
    )


def _table(stage: StagePlan) -> list[str]:
    """Return the lines of a table with memory per rank in GiB and times in ms, one row per ZeRO stage."""
    recomputed = stage.modules[0].activations[0].recomputed
    head = ["ZeRO", "weights", "grads", "moments", "EMA", "buckets", "total", "fits", "max micro-batch"]
    head += ["without ckpt" if recomputed else "with ckpt", "sent/step", "comm ms", "step ms"]
    rows = [head]
    for one in stage.shardings:
        states = one.states
        parts = (states.weights, states.gradients, states.moments, states.averages)
        mark = "*" if one.zero == stage.training.zero_stage else ""
        rows.append(
            [
                f"{one.zero}{mark}", *map(_gib, parts), _gib(states.persistent_bucket + states.transient),
                _gib(one.memory),
                "yes" if one.fits else "no", str(one.largest),
                "-" if one.largest_other is None else str(one.largest_other),
                _gib(one.sent), f"{1000 * one.communication:.2f}", f"{1000 * one.step:.2f}",
            ]
        )  # fmt: skip
    return [f"  {line}" for line in aligned_lines(rows, right=True)]


def _data(stage: StagePlan, nodes: int) -> str:
    if not stage.images_per_second:
        return "  data: no images are read"
    rate = stage.images_per_second / nodes
    return (
        f"  data: each node reads {rate:.4g} images/s, {rate * stage.bytes_per_image / 1e6:.3g} MB/s at "
        f"{stage.bytes_per_image / 1e3:.3g} kB per image, if it keeps no images in memory"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"


def assumptions(plan: ResourcePlan) -> list[str]:
    """Return the lines that list all assumptions of the plan."""
    settings, gpu = plan.settings, plan.gpu
    hidden = {
        None: "communication overlaps with computing at ZeRO 3 only, as in the engine",
        True: "communication overlaps with computing",
        False: "communication does not overlap with computing",
    }
    packing = "image sizes from the existing shards" if plan.measured_bytes else (
        f"a PNG has {settings.packing:g} times the bytes of its pixels (packing=), and 2 kB of tar"
    )  # fmt: skip
    lines = [
        f"{settings.gpu}: {gpu.about}",
        f"peak, dense: {gpu.bf16:g} TFLOP/s bf16; in fp32 {gpu.tf32:g} for convolutions (TF32), {gpu.fp32:g} for "
        "matrix products",
        f"efficiency={settings.efficiency:g} of the peak; only convolutions and matrix products are counted; time and "
        "days are inversely proportional to it, so measure your own",
        f"{gpu.memory:g} GB of memory, of which reserve={settings.reserve:g} stays free; {gpu.bandwidth:g} GB/s",
        f"rings at {bandwidth(settings, gpu) / 1e9:g} GB/s per GPU and direction, the slowest link, without latency; "
        f"{hidden[settings.overlap]}",
        "gradients and weights are sent in fp32; weights, moments and averages are fp32",
        "the tables are in GiB per GPU; * marks the recipe's ZeRO stage",
        "saved activations are counted for CUDA autocast and fused attention; transient memory is counted with CPU "
        "kernels and scaled by the GPU/CPU ratio of saved activations; cuDNN workspaces are not counted",
        f"data: {packing}",
        "no time for reading, saving, previews, scores, fitting the prior or a cache; all ranks are equally fast",
    ]
    if any(stage.training.offload for stage in plan.stages):
        lines.append("offload is ignored: the optimizer's state and step are counted on the GPU")
    return ["assumptions:", *(f"  - {line}" for line in lines)]


def plan_figures(plan: ResourcePlan) -> dict[str, Any]:
    """Return the plan as a dictionary for JSON. Memory is in bytes and time in seconds, except `gpu_days`."""
    named = asdict(plan, dict_factory=lambda pairs: {k: v.name if isinstance(v, Enum) else v for k, v in pairs})
    return named | {"predicted": True}
