"""What tools/evaluate.py does: one result, or quality against network evaluations or noise on x_hat.

Each point is kept, so that all of it is resumable.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dvae.errors import UserError
from dvae.evaluation import memorization, plots, tables
from dvae.evaluation.benchmark import Bench, Drawing, Result, point, score
from dvae.evaluation.evaluation_settings import EvaluateToolConfig
from dvae.evaluation.image_sets import open_image_set
from dvae.registry.samplers.base import SAMPLERS
from dvae.tracking.console import say
from dvae.utils import atomic_files


def assess(settings: EvaluateToolConfig) -> Result:
    """One result: samples of a run, or files, scored; written to `settings.out` and returned."""
    bench = Bench(settings)
    if settings.memorization:
        memorization.refuse(bench)
    if settings.run:
        how = Drawing(bench, settings.sampler)
        result = point(how)
        if settings.memorization:
            sets, _ = how.draw(settings.seeds[0])
            picture = Path(settings.out).with_suffix(".memorization.png")
            result |= {"memorization": memorization.check(bench, sets["refined"], picture)}
    else:
        images = open_image_set("images", settings.images)
        result = score(bench, {"images": [images]}, {}, 0, {"images": settings.images, "sha256": images.sha256()})
    atomic_files.write_json(Path(settings.out), result)
    return result


def sweep_nfe(settings: EvaluateToolConfig) -> list[Result]:
    """Each sampler at each number of steps: JSON, picture and table beside each other.

    Raises UserError for a sampler that has no steps, or does not integrate the run's process, before any is drawn.
    """
    bench = Bench(settings)
    assert bench.pipeline is not None
    own: Any = bench.pipeline.sampler.config
    nodes: list[dict[str, Any]] = []
    for name in settings.samplers or [own.name]:
        SAMPLERS.get(name)
        for steps in settings.steps:
            node = (asdict(own) if name == own.name else {"name": name}) | {"steps": steps}
            Drawing(bench, node).used()  # refuses one that does not fit, before any is drawn
            nodes.append(node)
    results = []
    for number, node in enumerate(nodes):
        say(f"point {number + 1} of {len(nodes)}: {node['name']}, {node['steps']} steps")
        results.append(point(Drawing(bench, node)))
    nfe = [result["protocol"]["nfe"] for result in results]
    title = f"{settings.n} samples x {len(settings.seeds)} seeds against {len(bench.reference)} real images"
    return finish(settings, results, nfe, [node["name"] for node in nodes], "NFE per image", title, "nfe")


def sweep_noise(settings: EvaluateToolConfig) -> list[Result]:
    """Samples refined from x_hat with Gaussian noise of each standard deviation."""
    if settings.vae:
        raise UserError("vae=true and noise= do not go together: noise is added to what the VAE drew")
    bench = Bench(settings)
    results = []
    for number, noise in enumerate(settings.noise):
        say(f"point {number + 1} of {len(settings.noise)}: noise {noise:g}")
        results.append(point(Drawing(bench, settings.sampler, noise)))
    label = "standard deviation of the noise on x_hat (images in [-1, 1])"
    title = f"{settings.n} samples x {len(settings.seeds)} seeds against {len(bench.reference)} real images"
    return finish(settings, results, list(settings.noise), [""] * len(results), label, title, "noise")


def finish(
    settings: EvaluateToolConfig, results: list[Result], places: list[float], curves: list[str], x_label: str,
    title: str, varied: str,
) -> list[Result]:  # fmt: skip
    """Write figures, picture and table."""
    out = Path(settings.out)
    plots.study(results, places, curves, x_label, title, out.with_suffix(".png"))
    atomic_files.write_text(out.with_suffix(".md"), tables.of_study(results, varied) + "\n")
    atomic_files.write_json(out, {"varied": varied, "points": results})
    return results
