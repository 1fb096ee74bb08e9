"""Compare a quantized bundle with its original, and decide whether it may be offered for speed."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dvae.config.schema import EvaluateConfig, ModelConfig, Precision
from dvae.evaluation.quantization.quantize_settings import QuantizeConfig
from dvae.inference.batching import CHUNK_SIZE
from dvae.inference.pipeline import Pipeline
from dvae.inference.refine import generate_batch
from dvae.inference.run_images import open_split
from dvae.models import bundle
from dvae.models.quantization import layer_plan
from dvae.tracking.console import Progress
from dvae.utils.evenly_spaced import evenly_spaced

Real = tuple[torch.Tensor, torch.Tensor]
"""Training images and held-out images, each (n, C, H, W) uint8."""


def real_images(run: str, shards: str, config: ModelConfig, n: int) -> Real:
    """Read training images as reference, and n held-out images for the floor, evenly spaced in their splits.

    Raises UserError if there are no shards, or if they are not the shards of the run.
    """
    train, heldout = (open_split(run, config, split, shards) for split in ("train", "heldout"))
    return train.read(evenly_spaced(len(train), EvaluateConfig().n_reference)), heldout.read(
        evenly_spaced(len(heldout), n)
    )


def measure(original: Pipeline, quantized: Pipeline, real: Real | None, settings: QuantizeConfig) -> dict[str, Any]:
    """Measure the speed and the KID of both bundles, and summarize them; see `summary`. Both compute in bf16.

    Leaves out the speed if settings.rounds is 0, and KID if `real` is None.
    """
    for pipeline in (original, quantized):
        pipeline.config.precision = Precision.bf16
    found: dict[str, Any] = {}
    if settings.rounds:
        found["speed"] = speed(original, quantized, settings.rounds, settings.seed)
    if real is not None:
        found["kid"] = kid(original, quantized, real, settings)
    return found | summary(found, settings.budget)


def sizes(source: Path, out: Path, original: Pipeline, quantized: Pipeline) -> dict[str, Any]:
    """Compare sizes in bytes: of the bundles on disk, of their networks on disk (without the prior), and in memory."""

    def on_disk(folder: Path) -> int:
        files = (folder / name for name in (bundle.WEIGHTS, bundle.CONFIG, bundle.INFO, layer_plan.FILE))
        return sum(file.stat().st_size for file in files if file.is_file())

    prior = sum(tensor.nbytes for tensor in original.models.prior.state_dict().values())
    pairs = {
        "disk": (on_disk(source), on_disk(out)),
        "networks_on_disk": (on_disk(source) - prior, on_disk(out) - prior),
        "memory": (layer_plan.memory_bytes(original.models), layer_plan.memory_bytes(quantized.models)),
    }
    return {name: {"original": a, "quantized": b, "ratio": round(b / a, 4)} for name, (a, b) in pairs.items()}


def speed(original: Pipeline, quantized: Pipeline, turns: int, seed: int) -> dict[str, Any]:
    """Measure the images per second of both pipelines.

    They take turns in one thread, so other load on the machine slows down both. "ratio" is the speed of the
    quantized one divided by the speed of the original: median and quartiles over `turns` turns.
    """
    both = {"original": original, "quantized": quantized}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    with Progress("speed", turns) as progress:
        for turn in range(turns + 1):
            for name, pipeline in both.items():
                began = time.perf_counter()
                nfe = generate_batch(pipeline, range(CHUNK_SIZE), seed).nfe
                if turn:  # the first turn is a warm-up
                    seconds[name].append(time.perf_counter() - began)
            progress.update(turn, 2 * CHUNK_SIZE)
    ratios = [a / b for a, b in zip(seconds["original"], seconds["quantized"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if turns > 1 else ratios * 3
    rates = {name: round(CHUNK_SIZE / statistics.median(of), 3) for name, of in seconds.items()}
    ratio = {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}
    return {"images_per_second": rates, "ratio": ratio, "nfe": float(nfe.float().mean()), "turns": turns}


def kid(original: Pipeline, quantized: Pipeline, real: Real, settings: QuantizeConfig) -> dict[str, Any]:
    """Compute the KID-lite0 of both on the same seeds, and the floor of held-out images.

    "ratio" is KID - floor of the quantized bundle, divided by KID - floor of the original. It is None if the original
    is not above the floor. "psnr" compares the samples of both pixel by pixel, in dB.
    """
    from dvae.evaluation.scorer import score_tensors  # here, because it needs torch-fidelity, which n=0 does not

    seeds = list(range(settings.seed, settings.seed + settings.seeds))
    sets: dict[str, list[torch.Tensor]] = {}
    with Progress("samples", 2 * settings.n * settings.seeds) as progress:
        for name, pipeline in (("original", original), ("quantized", quantized)):
            sets[name] = [
                pipeline.generate(
                    settings.n, seed, steps=settings.steps or None,
                    advance=lambda count: progress.update(progress.step + count, count),
                )[1]
                for seed in seeds
            ]  # fmt: skip
    sampler: Any = OmegaConf.to_container(OmegaConf.structured(original.sampler.config), enum_to_str=True)
    if settings.steps:
        sampler["steps"] = settings.steps
    with tempfile.TemporaryDirectory() as cache:
        scored = score_tensors(
            sets, *real, seeds=seeds, sampler=sampler, nfe=quantized.nfe, kid_subset_size=settings.kid_subset_size,
            kid_subsets=100, cache=Path(cache),
        )  # fmt: skip
    floor = next(iter(scored["floor"].values()))["KID-lite0"]["mean"]
    figures = {name: scored["sets"][name]["KID-lite0"] for name in sets}
    above = {name: of["mean"] - floor for name, of in figures.items()}
    error = torch.cat(sets["original"]).float() - torch.cat(sets["quantized"]).float()
    return {
        "n": settings.n,
        "seeds": seeds,
        "nfe": quantized.nfe,
        **{name: {"mean": of["mean"], "se": of["se"], "per_seed": of["per_seed"]} for name, of in figures.items()},
        "floor": floor,
        "ratio": above["quantized"] / above["original"] if above["original"] > 0 else None,
        "psnr": float(10.0 * torch.log10(255.0**2 / error.square().mean())),
    }


def summary(found: dict[str, Any], budget: float) -> dict[str, Any]:
    """Decide whether the quantized bundle may be offered for speed: {"faster": bool, "why": the reason in one line}.

    It may if it was faster than the original in at least three of four turns, and if KID minus the floor grew by at
    most the share `budget`.
    """
    if "speed" not in found:
        return {"faster": False, "why": "speed was not measured"}
    ratio = found["speed"]["ratio"]
    slower = ratio["quartiles"][0] <= 1.0
    line = f"{ratio['median']:.2f} times the original's speed in bf16 (quartiles {ratio['quartiles'][0]:.2f} to "
    line += f"{ratio['quartiles'][1]:.2f})"
    if slower:
        return {"faster": False, "why": f"{line}: not faster on this machine"}
    if "kid" not in found or found["kid"]["ratio"] is None:
        return {"faster": False, "why": f"{line}, but its KID was not measured: add n=200"}
    grown = found["kid"]["ratio"] - 1.0
    line += f", KID above the floor {100 * grown:+.1f}%"
    if grown > budget:
        return {"faster": False, "why": f"{line}: more than the budget of {100 * budget:g}%"}
    return {"faster": True, "why": f"{line}: within the budget of {100 * budget:g}%"}
