"""Compute one result of tools/evaluate.py, or a study: results over network evaluations, or over noise on x_hat.

Each point of a study is cached, so an interrupted study can be resumed.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dvae.errors import UserError
from dvae.evaluation import memorization, metric_plots, tables
from dvae.evaluation.evaluation_settings import EvaluateToolConfig
from dvae.evaluation.image_sets import open_image_set
from dvae.evaluation.sample_scores import EvaluationContext, SampleSpec, score_samples, score_sets
from dvae.evaluation.scorer import Result
from dvae.registry.samplers.base import SAMPLERS
from dvae.tracking.console import say
from dvae.utils import atomic_files


def score_once(settings: EvaluateToolConfig) -> Result:
    """Score the samples of a run, or image files. The result is written to `settings.out` and returned."""
    context = EvaluationContext(settings)
    if settings.memorization:
        memorization.require_heldout(context)
    if settings.run:
        spec = SampleSpec(context, settings.sampler)
        result = score_samples(spec)
        if settings.memorization:
            sets, _ = spec.generate(settings.seeds[0])
            picture = Path(settings.out).with_suffix(".memorization.png")
            result |= {"memorization": memorization.report(context, sets["refined"], picture)}
    else:
        images = open_image_set("images", settings.images)
        result = score_sets(
            context, {"images": [images]}, {}, 0, {"images": settings.images, "sha256": images.sha256()}
        )
    atomic_files.write_json(Path(settings.out), result)
    return result


def sweep_nfe(settings: EvaluateToolConfig) -> list[Result]:
    """Score each sampler with each number of steps, and write a JSON file, a picture and a table.

    Raises UserError, before any sample is drawn, if a sampler has no steps or does not fit the run's process.
    """
    context = EvaluationContext(settings)
    assert context.pipeline is not None
    own: Any = context.pipeline.sampler.config
    nodes: list[dict[str, Any]] = []
    for name in settings.samplers or [own.name]:
        SAMPLERS.get(name)
        for steps in settings.steps:
            node = (asdict(own) if name == own.name else {"name": name}) | {"steps": steps}
            SampleSpec(
                context, node
            ).sampler_settings()  # raises UserError if it does not fit, before any sample is drawn
            nodes.append(node)
    results = []
    for number, node in enumerate(nodes):
        say(f"point {number + 1} of {len(nodes)}: {node['name']}, {node['steps']} steps")
        results.append(score_samples(SampleSpec(context, node)))
    nfe = [result["protocol"]["nfe"] for result in results]
    title = f"{settings.n} samples x {len(settings.seeds)} seeds against {len(context.scorer.reference)} real images"
    return write_study(settings, results, nfe, [node["name"] for node in nodes], "NFE per image", title, "nfe")


def sweep_noise(settings: EvaluateToolConfig) -> list[Result]:
    """Score samples refined from x_hat plus Gaussian noise, for each standard deviation in `settings.noise`.

    Writes a JSON file, a picture and a table. Raises UserError if the VAE's samples should be scored too.
    """
    if settings.vae:
        raise UserError("vae=true and noise= do not go together: noise is added to what the VAE drew")
    context = EvaluationContext(settings)
    results = []
    for number, noise in enumerate(settings.noise):
        say(f"point {number + 1} of {len(settings.noise)}: noise {noise:g}")
        results.append(score_samples(SampleSpec(context, settings.sampler, noise)))
    label = "standard deviation of the noise on x_hat (images in [-1, 1])"
    title = f"{settings.n} samples x {len(settings.seeds)} seeds against {len(context.scorer.reference)} real images"
    return write_study(settings, results, list(settings.noise), [""] * len(results), label, title, "noise")


def write_study(
    settings: EvaluateToolConfig, results: list[Result], x_values: list[float], curves: list[str], x_label: str,
    title: str, varied: str,
) -> list[Result]:  # fmt: skip
    """Write the results, picture and table of a study. `varied` names the quantity in which its points differ."""
    out = Path(settings.out)
    metric_plots.plot_study(results, x_values, curves, x_label, title, out.with_suffix(".png"))
    atomic_files.write_text(out.with_suffix(".md"), tables.of_study(results, varied) + "\n")
    atomic_files.write_json(out, {"varied": varied, "points": results})
    return results
