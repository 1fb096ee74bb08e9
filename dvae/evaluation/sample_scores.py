"""Score the samples of a run, or image files, against real images: one result of tools/evaluate.py."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dvae.config.compose import refuse_points
from dvae.data.shards.manifest import FILE as MANIFEST
from dvae.data.shards.manifest import Manifest
from dvae.errors import UserError
from dvae.evaluation import metrics
from dvae.evaluation.evaluation_settings import EvaluateToolConfig, check, computable_metrics
from dvae.evaluation.features import FeatureMethod
from dvae.evaluation.image_sets import ImageArray, ImageSet, open_image_set, require_same_size
from dvae.evaluation.metric_suite import MetricSuite
from dvae.evaluation.noise_robustness import NoisyConfig, NoisySampleTask
from dvae.evaluation.results import damaged_cache_file, read_result
from dvae.evaluation.scorer import Result, Scorer
from dvae.inference import pipeline as pipelines
from dvae.inference.generation.generate import generate_to_file
from dvae.inference.generation.generation_settings import SampleConfig
from dvae.inference.generation.sample_task import SampleTask
from dvae.inference.generation.task import json_value
from dvae.inference.run_images import run_shards
from dvae.models import bundle
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile


class EvaluationContext:
    """What all results of one command share: the settings, the scorer with the real images, and the run's pipeline."""

    def __init__(self, settings: EvaluateToolConfig) -> None:
        """Raises UserError if the settings, the weights of Inception or the real images cannot be used."""
        check(settings)
        self.settings = settings
        extractor = metrics.inception(Path(settings.inception)) if settings.inception else metrics.lite0()
        method = FeatureMethod.for_extractor(extractor, settings.batch, settings.processes)
        suite = MetricSuite(
            metrics=computable_metrics(settings), suffix=extractor.suffix, kid_subset_size=settings.kid_subset_size,
            kid_subsets=settings.kid_subsets, prc_neighborhood=settings.prc_neighborhood,
            isc_splits=settings.isc_splits,
        )  # fmt: skip
        self.cache = Path(settings.cache) if settings.cache else Path(settings.out).parent / "evaluation-cache"
        self.pipeline = _pipeline(settings) if settings.run else None
        place = settings.reference or self._trained_on()
        reference = open_image_set("reference", place, settings.split, settings.n_reference)
        suite.check("the reference", len(reference))
        shards = (Path(place) / MANIFEST).exists()
        split = settings.split if shards else "all"
        unseen = Manifest.load(Path(place)).count("heldout") if shards and settings.split == "train" else 0
        most = min(unseen, settings.n * len(settings.seeds))
        heldout = open_image_set("reference", place, "heldout", most) if unseen else None
        self.scorer = Scorer(method, suite, reference, heldout, split, self.cache)
        _ = self.scorer.reference_sha256  # rejects images of different sizes before the slow part starts

    @property
    def seeds(self) -> list[int]:
        """Seeds of the sets of samples; empty if image files are scored."""
        return list(self.settings.seeds) if self.settings.run else []

    def _trained_on(self) -> str:
        """Path of the shards that the run was trained on. Raises UserError if they are not on this machine."""
        assert self.pipeline is not None
        return str(run_shards(self.settings.run, self.pipeline.config, "reference"))


def _pipeline(settings: EvaluateToolConfig) -> pipelines.Pipeline:
    """The run's pipeline. Raises UserError if the run models 2-D points, not images."""
    # On the CPU, because only its settings are used. The tasks that draw samples load their own.
    pipeline = pipelines.load(settings.run, device="cpu")
    refuse_points(pipeline.config, settings.run)
    return pipeline


@dataclass(frozen=True)
class SampleSpec:
    """How samples of the run are drawn: the sampler, and noise on x_hat."""

    context: EvaluationContext
    sampler: Any
    """Sampler in the form that tools/sample.py accepts. None: the run's sampler."""
    noise: float | None = None
    """Standard deviation of the noise on x_hat. None: do not add noise."""

    def sampler_settings(self) -> dict[str, Any]:
        """The sampler's name and all its settings. Raises UserError if it does not fit the run."""
        pipeline = self.context.pipeline
        assert pipeline is not None
        with pipeline.using():  # restores the run's sampler at the end
            if self.sampler is not None:
                pipeline.use_sampler(self.sampler)
            return {key: json_value(value) for key, value in asdict(pipeline.sampler.config).items()}

    def provenance(self) -> dict[str, Any]:
        """What determines the samples besides sampler, number and seed; for the protocol."""
        settings = self.context.settings
        hashes = bundle.read_hashes(settings.run)
        found = {"run": settings.run, "weights_sha256": hashes["weights"], "config_sha256": hashes["config"],
                 "guidance": settings.guidance, "label_guidance": settings.label_guidance,
                 "pca_guidance": settings.pca_guidance}  # fmt: skip
        return found | ({} if self.noise is None else {"noise": self.noise})

    def request(self) -> dict[str, Any]:
        """Everything that determines the samples of a seed. The path of the run does not."""
        settings = self.context.settings
        found = {"sampler": self.sampler_settings(), "n": settings.n, "vae": settings.vae, **self.provenance()}
        return {name: value for name, value in found.items() if name != "run"}

    def generate(self, seed: int) -> tuple[dict[str, ImageArray], float]:
        """Draw the samples of a seed into the cache, unless they are there.

        Returns the sets by name ("vae", "refined"), and the number of network evaluations per image.
        """
        settings = self.context.settings
        out = self.context.cache / f"samples-{request_key(self.request() | {'seed': seed})}.npy"
        out.parent.mkdir(parents=True, exist_ok=True)
        words: dict[str, Any] = {
            "run": settings.run, "n": settings.n, "seed": seed, "out": str(out), "vae": settings.vae,
            "processes": settings.processes, "guidance": settings.guidance, "label_guidance": settings.label_guidance,
            "pca_guidance": settings.pca_guidance, "plugins": settings.plugins, "sampler": self.sampler,
        }  # fmt: skip
        if self.noise is None:
            done = generate_to_file(SampleConfig(**words), SampleTask)
        else:
            done = generate_to_file(NoisyConfig(**words, noise=self.noise), NoisySampleTask)
        names = ["vae", "refined"] if settings.vae else ["refined"]
        return {name: ImageArray(str(out), len(names), which) for which, name in enumerate(names)}, done.nfe


def score_samples(spec: SampleSpec) -> Result:
    """Score samples of the run. The result is cached, so the same command does not compute it again.

    Raises UserError if there are too few samples for a metric, or if the run has no VAE samples to score.
    """
    context, sampler = spec.context, spec.sampler_settings()
    settings, scorer = context.settings, context.scorer
    scorer.suite.check("a set", settings.n)
    if settings.vae and context.pipeline and not context.pipeline.models.has_generator:
        raise UserError(f"vae=true: run={settings.run} draws nothing before refinement: leave it out")
    protocol = asdict(scorer.protocol(settings.n, context.seeds, sampler, 0, spec.provenance()))
    # The key of the cache has all settings that determine the result. The NFE is only known after sampling.
    asked = {name: value for name, value in protocol.items() if name not in ("packages", "nfe", "made")}
    asked |= spec.request() | {"metrics": [metric.name for metric in scorer.suite.metrics]}
    path = context.cache / f"result-{request_key(asked)}.json"
    if path.exists():
        return _read(path)
    drawn = [spec.generate(seed) for seed in settings.seeds]
    sets: dict[str, list[ImageSet]] = {name: [of_seed[name] for of_seed, _ in drawn] for name in drawn[0][0]}
    result = score_sets(context, sets, sampler, sum(nfe for _, nfe in drawn) / len(drawn), spec.provenance())
    atomic_files.write_json(path, result)
    return result


def score_sets(
    context: EvaluationContext,
    sets: dict[str, list[ImageSet]],
    sampler: dict[str, Any],
    nfe: float,
    made: dict[str, Any],
) -> Result:
    """Compute the metrics of sets of images, one image set per seed under each name, and of the floor.

    `sampler`, `nfe` and `made` are entered in the protocol. Raises UserError if there are too few images, or if images
    have different sizes.
    """
    every = [images for each in sets.values() for images in each]
    n, scorer = len(every[0]), context.scorer
    scorer.suite.check("a set" if context.settings.run else f"images={context.settings.images}", n)
    for images in every:
        images.sha256()  # rejects images of different sizes before the slow part starts
        require_same_size(images, scorer.reference)
    return scorer.score(sets, n=n, seeds=context.seeds, sampler=sampler, nfe=nfe, made=made)


def request_key(request: dict[str, Any]) -> str:
    """A hash of a JSON-ready request, for names of files in the cache."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path) -> Result:
    """Read a cached result. Raises MachineError if it is damaged."""
    try:
        return read_result(path)
    except (DamagedFile, UserError) as error:
        raise damaged_cache_file(path, error) from None
