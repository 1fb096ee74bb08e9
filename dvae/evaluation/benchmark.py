"""Images drawn from a run, or found in files, scored against real ones: one point of what tools/evaluate.py does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dvae.config.compose import refuse_points
from dvae.data.shards.manifest import FILE as MANIFEST
from dvae.data.shards.manifest import Manifest
from dvae.errors import MachineError, UserError
from dvae.evaluation import features, metrics
from dvae.evaluation.evaluation_settings import EvaluateToolConfig, check, computed
from dvae.evaluation.features import Way
from dvae.evaluation.image_sets import ImageArray, ImageSet, open_image_set, require_same_size
from dvae.evaluation.measures import Measures, Metric
from dvae.evaluation.metrics import Features
from dvae.evaluation.noise_robustness import NoisyConfig, NoisySampleTask
from dvae.evaluation.protocol import Protocol
from dvae.evaluation.results import read_result
from dvae.inference import pipeline as pipelines
from dvae.inference.generation.generate import generate_to_file
from dvae.inference.generation.generation_settings import SampleConfig
from dvae.inference.generation.sample_task import SampleTask
from dvae.inference.generation.task import json_value
from dvae.inference.run_images import run_shards
from dvae.models import bundle
from dvae.tracking.console import Progress
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile

Result = dict[str, Any]
"""{"protocol": ..., "sets": {name: figures}, "floor": {name: figures}}, as dvae.evaluation.scorer has it."""


class Bench:
    """All that the points of one command have in common: extractor, measures, reference."""

    def __init__(self, settings: EvaluateToolConfig) -> None:
        """Raises UserError for words, a file of weights or images that cannot be scored."""
        check(settings)
        self.settings = settings
        extractor = metrics.inception(Path(settings.inception)) if settings.inception else metrics.lite0()
        self.way = Way.of(extractor, settings.batch, settings.processes)
        self.measures = Measures(
            metrics=computed(settings), suffix=extractor.suffix, kid_subset_size=settings.kid_subset_size,
            kid_subsets=settings.kid_subsets, prc_neighborhood=settings.prc_neighborhood,
            isc_splits=settings.isc_splits,
        )  # fmt: skip
        self.cache = Path(settings.cache) if settings.cache else Path(settings.out).parent / "evaluation-cache"
        self.pipeline = _pipeline(settings) if settings.run else None
        place = settings.reference or self._trained_on()
        self.reference = open_image_set("reference", place, settings.split, settings.n_reference)
        self.measures.check("the reference", len(self.reference))
        shards = (Path(place) / MANIFEST).exists()
        self.reference_split = settings.split if shards else "all"
        unseen = Manifest.load(Path(place)).count("heldout") if shards and settings.split == "train" else 0
        most = min(unseen, settings.n * len(settings.seeds))
        self.heldout: ImageSet | None = open_image_set("reference", place, "heldout", most) if unseen else None
        """Real images that the reference has not, for the floor."""
        self.reference_sha256 = self.reference.sha256()

    def _trained_on(self) -> str:
        """The run's shards. Raises UserError where they are not on this machine."""
        assert self.pipeline is not None
        return str(run_shards(self.settings.run, self.pipeline.config, "reference"))

    def real(self) -> tuple[Features, Features | None]:
        """Features of the reference and of held-out images, kept."""
        sets = [self.reference, *([self.heldout] if self.heldout else [])]
        with Progress("real images", sum(map(len, sets))) as bar:
            found = [self.features_of(images, bar) for images in sets]
        return found[0], found[1] if self.heldout else None

    def features_of(self, images: ImageSet, bar: Progress) -> Features:
        sha256 = self.reference_sha256 if images is self.reference else images.sha256()
        return features.kept(images, sha256, self.way, self.cache, lambda n: bar.update(bar.step + n, n))

    def protocol(self, n: int, sampler: dict[str, Any], nfe: float, made: dict[str, Any]) -> Protocol:
        asked, measures, extractor = self.measures.metrics, self.measures, self.way.extractor
        kid, one = Metric.kid in asked, self.reference.size()
        return Protocol(
            backend=metrics.backend(),
            extractor=extractor.name,
            weights_sha256=extractor.weights_sha256,
            resize=extractor.resize,
            image_size=one[0],
            n=n,
            reference_split=self.reference_split,
            n_reference=len(self.reference),
            reference_sha256=self.reference_sha256,
            seeds=list(self.settings.seeds) if self.settings.run else [],
            kid_subset_size=measures.kid_subset_size if kid else None,
            kid_subsets=measures.kid_subsets if kid else None,
            kid_seed=measures.seed,
            prc_neighborhood=measures.prc_neighborhood if Metric.prc in asked else None,
            isc_splits=measures.isc_splits if Metric.isc in asked else None,
            sampler=sampler,
            nfe=nfe,
            packages=metrics.packages(),
            made=made,
            batch=self.way.batch,
            threads=self.way.threads,
        )


def _pipeline(settings: EvaluateToolConfig) -> pipelines.Pipeline:
    pipeline = pipelines.load(settings.run, device="cpu")  # only looked at: drawing loads its own
    refuse_points(pipeline.config, settings.run)
    return pipeline


@dataclass(frozen=True)
class Drawing:
    """How samples of the run are drawn: with which sampler, and noise on x_hat."""

    bench: Bench
    sampler: Any
    """As tools/sample.py takes it."""
    noise: float | None = None

    def used(self) -> dict[str, Any]:
        """The sampler's name and all its settings. Raises UserError where it does not fit the run."""
        pipeline = self.bench.pipeline
        assert pipeline is not None
        with pipeline.using():  # the run's own is there again at the end
            if self.sampler is not None:
                pipeline.use_sampler(self.sampler)
            return {key: json_value(value) for key, value in asdict(pipeline.sampler.config).items()}

    def made(self) -> dict[str, Any]:
        """What else decides the samples, for the protocol."""
        settings = self.bench.settings
        hashes = bundle.read_hashes(settings.run)
        found = {"run": settings.run, "weights_sha256": hashes["weights"], "config_sha256": hashes["config"],
                 "guidance": settings.guidance, "label_guidance": settings.label_guidance,
                 "pca_guidance": settings.pca_guidance}  # fmt: skip
        return found | ({} if self.noise is None else {"noise": self.noise})

    def request(self) -> dict[str, Any]:
        """What decides the samples of a seed; not where the run lies."""
        settings = self.bench.settings
        found = {"sampler": self.used(), "n": settings.n, "vae": settings.vae, **self.made()}
        return {name: value for name, value in found.items() if name != "run"}

    def draw(self, seed: int) -> tuple[dict[str, ImageArray], float]:
        """The sets of a seed by name, drawn into the cache unless they are there, and evaluations per image."""
        settings, bench = self.bench.settings, self.bench
        out = bench.cache / f"samples-{key_of(self.request() | {'seed': seed})}.npy"
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


def point(how: Drawing) -> Result:
    """Samples of the run, scored; the result is kept in the cache, so that it need not be found again."""
    bench, used = how.bench, how.used()
    settings = bench.settings
    bench.measures.check("a set", settings.n)
    if settings.vae and bench.pipeline and not bench.pipeline.models.has_generator:
        raise UserError(f"vae=true: run={settings.run} draws nothing before refinement: leave it out")
    protocol = asdict(bench.protocol(settings.n, used, 0, how.made()))
    asked = {name: value for name, value in protocol.items() if name not in ("packages", "nfe", "made")}
    asked |= how.request() | {"metrics": [metric.name for metric in bench.measures.metrics]}
    path = bench.cache / f"result-{key_of(asked)}.json"
    if path.exists():
        return _read(path)
    drawn = [how.draw(seed) for seed in settings.seeds]
    sets: dict[str, list[ImageSet]] = {name: [of_seed[name] for of_seed, _ in drawn] for name in drawn[0][0]}
    result = score(bench, sets, used, sum(nfe for _, nfe in drawn) / len(drawn), how.made())
    atomic_files.write_json(path, result)
    return result


def score(
    bench: Bench, sets: dict[str, list[ImageSet]], sampler: dict[str, Any], nfe: float, made: dict[str, Any]
) -> Result:
    """Figures of sets of images, one per seed, and the floor. Raises UserError for too few or unlike images."""
    every = [images for each in sets.values() for images in each]
    n = len(every[0])
    bench.measures.check("a set" if bench.settings.run else f"images={bench.settings.images}", n)
    for images in every:
        images.sha256()  # refuses images of unlike size before anything takes long
        require_same_size(images, bench.reference)
    real, unseen = bench.real()
    with Progress("samples", sum(map(len, every))) as bar:
        made_features = {
            name: [features.of_set(images, bench.way, lambda k: bar.update(bar.step + k, k)) for images in each]
            for name, each in sets.items()
        }
    scored = {name: bench.measures.figures(parts, real) for name, parts in made_features.items()}
    floor = bench.measures.floor(real, unseen, n, len(next(iter(sets.values()))))
    return {"protocol": asdict(bench.protocol(n, sampler, nfe, made)), "sets": scored, "floor": floor}


def key_of(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path) -> Result:
    try:
        return read_result(path)
    except (DamagedFile, UserError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise MachineError(f"{path}: damaged ({reason}); delete it, it will be made again") from None
