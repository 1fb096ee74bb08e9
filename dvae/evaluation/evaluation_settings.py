"""What tools/evaluate.py takes, and which words go together."""

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
    """What tools/evaluate.py takes."""

    run: str = ""
    """A run folder or a bundle whose samples are scored."""
    images: str = ""
    """Or images that are there: a folder of PNG or JPEG files, a .zip, .tar or .npy file."""
    reference: str = ""
    """Real images: shards, or as `images` (empty: the shards that the run was trained on)."""
    split: str = "train"
    """Split of the reference where that is shards."""
    n: int = 1000
    """Samples per seed."""
    n_reference: int = 0
    """Images of the reference, evenly spread over it (0: all)."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the samples, a set each."""
    vae: bool = False
    """Score the VAE's samples too, of which the run's are refined."""
    guidance: float = 1.0
    """Weight of x_hat, z and class together."""
    label_guidance: float = 1.0
    """Weight of the class alone."""
    pca_guidance: float = 1.0
    """Weight of z's principal coordinates alone."""
    metrics: list[Metric] = field(default_factory=lambda: list(Metric))
    """fid | kid | isc | prc; isc needs `inception`."""
    inception: str = ""
    """File of the standard Inception's weights (empty: EfficientNet-Lite0, and figures named -lite0)."""
    kid_subset_size: int = 1000
    """Images per subset of KID."""
    kid_subsets: int = 100
    """Subsets of KID."""
    prc_neighborhood: int = 3
    """Neighbors that a ball of precision and recall reaches to."""
    isc_splits: int = 10
    """Parts of the samples that IS is a mean over."""
    batch: int = 64
    """Images per pass of the feature network."""
    processes: int = 1
    """Processes of this machine that draw and that compute features."""
    over: str = ""
    """The word sweep=: nfe: draw with each of `samplers` at each of `steps`."""
    samplers: list[str] = field(default_factory=list)
    """For sweep=nfe: names of samplers ([]: the run's own). The run's own keeps its settings, others have theirs."""
    steps: list[int] = field(default_factory=lambda: [5, 10, 25, 50])
    """For sweep=nfe: steps of each."""
    noise: list[float] = field(default_factory=list)
    """Standard deviations of Gaussian noise on x_hat (images are in [-1, 1]), a point each."""
    memorization: int = 0
    """Show so many samples, those nearest to a training image, beside it (0: none)."""
    compare: list[str] = field(default_factory=list)
    """Results of earlier commands to put into one table; nothing is computed."""
    out: str = "evaluation.json"
    """The figures; pictures and tables lie beside it."""
    cache: str = ""
    """Folder of samples, features and finished points (empty: evaluation-cache, beside `out`)."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""
    sampler: Any = None
    """Another sampler than the run's, or fields of the run's own."""


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateToolConfig, provider="dvae")


def check(settings: EvaluateToolConfig) -> None:
    """Raise UserError for words that do not go together or are out of range."""
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
        raise UserError(f"out={settings.out}: the figures are a JSON file, name it so")


def computable_metrics(settings: EvaluateToolConfig) -> tuple[Metric, ...]:
    """The metrics that can be had: all that are asked for, but IS where only EfficientNet-Lite0 is there."""
    asked = tuple(dict.fromkeys(settings.metrics))
    if settings.inception or Metric.isc not in asked:
        return asked
    say("IS is left out: it needs the standard Inception's classes (inception=FILE)")
    rest = tuple(metric for metric in asked if metric is not Metric.isc)
    if not rest:
        raise UserError("metrics=[isc] needs the standard Inception: give its weights, inception=FILE")
    return rest
