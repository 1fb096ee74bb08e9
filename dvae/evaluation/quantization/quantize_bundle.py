"""Quantize a bundle, then compare it with the original (tools/quantize.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dvae.evaluation.quantization import calibrate, compare
from dvae.evaluation.quantization.quantize_settings import QuantizeConfig, check_settings
from dvae.inference import pipeline as pipelines
from dvae.models import bundle, bundle_export
from dvae.models.quantization import layer_plan
from dvae.models.quantization.layer_plan import QuantizationPlan


def quantize(settings: QuantizeConfig) -> QuantizationPlan:
    """Write the quantized bundle, compare it with the original, and store the results in its plan.

    Returns the plan. Raises UserError, before anything is written, if the settings are invalid.
    """
    check_settings(settings)
    source, out = bundle.find_bundle(settings.run), Path(settings.out)
    info, config = bundle.read_verified(source)
    bundle.refuse_quantized(f"run={settings.run}", info)
    real = (
        compare.real_images(settings.run, settings.shards, config, settings.n * settings.seeds) if settings.n else None
    )
    plan = write_quantized(settings, source, out)
    original, quantized = pipelines.load(source, device="cpu"), pipelines.load(out, device="cpu")
    plan.measured = compare.measure(original, quantized, real, settings)
    for _ in range(2):  # twice, because the plan that holds the sizes is itself part of the sizes
        plan.measured["bytes"] = compare.sizes(source, out, original, quantized)
        layer_plan.write_plan(out, plan)
        bundle_export.update_hash(out, layer_plan.FILE)
    return plan


def write_quantized(settings: QuantizeConfig, source: Path, out: Path) -> QuantizationPlan:
    """Quantize the bundle `source` and write it to the folder `out`, without measurements. Returns the plan."""
    pipeline = pipelines.load(source, device="cpu")
    models = pipeline.models
    plan = layer_plan.make_plan(models, settings.method, settings.group, settings.buckets)
    names = plan.layers["denoiser"].get("integer", [])
    seen = (
        calibrate.calibrate_ranges(pipeline, names, settings.buckets, settings.calibration, settings.seed)
        if names
        else {}
    )
    layer_plan.replace_layers(models, plan, str(source))
    for name, range_ in seen.items():
        layer: Any = models.denoiser.get_submodule(name)
        layer.calibrate(range_.low, range_.high)
    bundle_export.export(out, pipeline.config, layer_plan.parts_to_save(models), plan)
    return plan
