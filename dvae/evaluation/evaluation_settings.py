"""Settings of tools/evaluate.py, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from dvae.errors import UserError
from dvae.evaluation.metric_suite import Metric
from dvae.tracking.console import say


@dataclass(kw_only=True, slots=True)
class EvaluateToolConfig:
    """Settings of tools/evaluate.py."""

    run: str = ""
    """Run folder or bundle whose samples are scored. Set either run or images."""
    images: str = ""
    """Images to score: a folder of PNG or JPEG files, or a .zip, .tar or .npy file. Needs `reference`."""
    reference: str = ""
    """Real images: shards, or a place like `images` (empty: the shards that the run was trained on)."""
    split: str = "train"
    """Split of the reference, if it is shards."""
    n: int = 1000
    """Number of samples per seed."""
    n_reference: int = 0
    """Number of images of the reference, evenly spaced in it (0: all)."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the samples. Each gives one set of n samples."""
    vae: bool = False
    """Whether to score the VAE's samples before refinement too."""
    guidance: float = 1.0
    """Guidance weight of all conditions together: x_hat, z and class (1: no guidance)."""
    label_guidance: float = 1.0
    """Guidance weight of the class alone (1: no guidance)."""
    pca_guidance: float = 1.0
    """Guidance weight of the principal coordinates of z alone (1: no guidance)."""
    metrics: list[Metric] = field(default_factory=lambda: list(Metric))
    """Metrics to compute: fid, kid, isc, prc. isc needs `inception`."""
    inception: str = ""
    """Weights file of the standard Inception network (empty: use EfficientNet-Lite0; metric names end in -lite0)."""
    kid_subset_size: int = 1000
    """Number of images per subset of KID, 2 or more."""
    kid_subsets: int = 100
    """Number of subsets of KID."""
    prc_neighborhood: int = 3
    """Precision and recall: the radius of an image's ball is the distance to its neighbor of this number."""
    isc_splits: int = 10
    """Number of parts of the samples over which IS is averaged."""
    batch: int = 64
    """Number of images per forward pass of the feature network."""
    processes: int = 1
    """Number of processes that draw samples and compute features."""
    over: str = ""
    """Set it as sweep=nfe: score each of `samplers` with each of `steps` (empty: no sweep)."""
    samplers: list[str] = field(default_factory=list)
    """For sweep=nfe: names of samplers ([]: the run's). The run's sampler keeps its settings, others use defaults."""
    steps: list[int] = field(default_factory=lambda: [5, 10, 25, 50])
    """For sweep=nfe: numbers of sampler steps."""
    noise: list[float] = field(default_factory=list)
    """Standard deviations of Gaussian noise to add to x_hat, in units of the range [-1, 1]. Each gives one result."""
    memorization: int = 0
    """Number of samples to show beside their nearest training images, the nearest samples first (0: none)."""
    compare: list[str] = field(default_factory=list)
    """Results of earlier commands to show in one table. Nothing is computed."""
    out: str = "evaluation.json"
    """JSON file of the results. Pictures and tables get the same name with another ending."""
    cache: str = ""
    """Folder for samples, features and finished results (empty: evaluation-cache, beside `out`)."""
    plugins: list[str] = field(default_factory=list)
    """Python modules to import first. They register components."""
    sampler: Any = None
    """A sampler to use instead of the run's, or fields of the run's sampler to change."""


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateToolConfig, provider="dvae")


def check(settings: EvaluateToolConfig) -> None:
    """Raise UserError if settings contradict each other or are out of range."""
    if bool(settings.run) == bool(settings.images):
        raise UserError("name what is scored: run=FOLDER, or images=FOLDER reference=FOLDER; one of the two")
    if settings.images and not settings.reference:
        raise UserError(f"images={settings.images}: name the real images too, reference=FOLDER")
    for name in ("over", "noise", "memorization", "vae", "sampler"):
        if settings.images and getattr(settings, name):
            word = "sweep" if name == "over" else name
            raise UserError(f"{word}= draws from a run: use run=FOLDER instead of images={settings.images}")
    least = {"n": 1, "n_reference": 0, "kid_subset_size": 2, "kid_subsets": 1, "prc_neighborhood": 1, "isc_splits": 1,
             "batch": 1, "processes": 1, "memorization": 0}  # fmt: skip
    for name, low in least.items():
        if getattr(settings, name) < low:
            raise UserError(f"{name}={getattr(settings, name)}: use {low} or more")
    if not settings.seeds or not settings.metrics:
        raise UserError(
            f"seeds={settings.seeds} metrics={[m.name for m in settings.metrics]}: name one or more of each"
        )
    if settings.over not in ("", "nfe"):
        raise UserError(f"sweep={settings.over}: use nfe")
    if settings.over and settings.noise:
        raise UserError("sweep= and noise= are two studies: ask for one at a time")
    if settings.over and (not settings.steps or min(settings.steps) < 1):
        raise UserError(f"steps={settings.steps}: name one or more numbers of steps, of 1 or more")
    if settings.over and settings.sampler is not None:
        raise UserError("sampler= and sweep= contradict each other: name the samplers in samplers=[...]")
    if settings.noise and min(settings.noise) < 0:
        raise UserError(f"noise={settings.noise}: use standard deviations of 0 or more")
    if Path(settings.out).suffix != ".json":
        raise UserError(f"out={settings.out}: the results are a JSON file: use a name that ends in .json")


def computable_metrics(settings: EvaluateToolConfig) -> tuple[Metric, ...]:
    """The metrics that can be computed: all that the settings ask for, but IS only with the standard Inception.

    Raises UserError if no metric is left.
    """
    asked = tuple(dict.fromkeys(settings.metrics))
    if settings.inception or Metric.isc not in asked:
        return asked
    say("IS is left out: it needs the standard Inception's classes (inception=FILE)")
    rest = tuple(metric for metric in asked if metric is not Metric.isc)
    if not rest:
        raise UserError("metrics=[isc] needs the standard Inception: give its weights, inception=FILE")
    return rest
