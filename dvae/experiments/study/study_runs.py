"""Run a study: train its runs, then generate and score the images of every point."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dvae.data.shards.reader import Shards
from dvae.errors import MachineError, UserError
from dvae.evaluation.results import damaged_cache_file, read_result
from dvae.evaluation.scorer import score_tensors
from dvae.experiments.launch_program import launch
from dvae.experiments.study.equivalence import ImageDifference, compare_formulations
from dvae.experiments.study.study_spec import GENERATOR, StudyConfig, arm_overrides, arm_stages, run_folder, shards
from dvae.inference import pipeline as pipelines
from dvae.inference.generation.task import json_value
from dvae.registry.stages.base import STAGES
from dvae.runs.folder import Run
from dvae.tracking.console import say
from dvae.utils import atomic_files
from dvae.utils.evenly_spaced import evenly_spaced
from dvae.utils.number_types import Seconds
from dvae.utils.read import JSON_LIMIT, DamagedFile, check, parse_json, read_bytes

KID = "KID-lite0"
"""The metric that a study compares."""
RECORD = "study.json"
VAE = "VAE alone"
StudyPoints = dict[str, dict[int, dict[str, Any]]]
"""Results of dvae.evaluation.scorer by arm and number of steps, over one image set per seed. The VAE has 0 steps."""


def run_study(settings: StudyConfig) -> tuple[StudyPoints, dict[str, float], dict[int, ImageDifference]]:
    """Train and score everything that does not exist yet.

    Returns the points, the seconds of training and scoring, and the difference of formulation 2 from formulation 1 by
    seed. Raises UserError if the settings are invalid or differ from the settings in the folder. Raises MachineError if
    a run fails.
    """
    claim_folder(settings)
    for seed in settings.seeds:
        overrides = [f"seed={seed}", f"data.shards={shards(settings)}"]
        train(settings, run_folder(settings, GENERATOR, seed), ("shards", "encoder", "prior"), overrides)
        for arm in settings.arms:
            train(
                settings, run_folder(settings, arm, seed), arm_stages(settings, arm), arm_overrides(settings, arm, seed)
            )
    points: StudyPoints = {VAE: {0: score_point(settings, VAE, 0)}}
    for arm in settings.arms:
        points[arm] = {steps: score_point(settings, arm, steps) for steps in settings.steps}
    return points, seconds(settings, points), check_equivalence(settings)


def claim_folder(settings: StudyConfig) -> None:
    """Create or open the study's folder and record the settings in it.

    Raises UserError if the folder holds something else, or a study with other settings. Seeds, arms and steps may be
    added later, and `batch` may change.
    """
    folder = Path(settings.out)
    fixed = {name: value for name, value in asdict(settings).items() if name not in ("out", "seeds", "steps", "batch")}
    record, arms = folder / RECORD, settings.arms
    if record.exists():
        theirs = read_record(record)
        same = theirs | {"arms": {name: overrides for name, overrides in theirs["arms"].items() if name in arms}}
        for name, value in (fixed | {"arms": {arm: arms[arm] for arm in same["arms"]}}).items():
            if same.get(name) != value:
                raise UserError(f"out={folder} is a study with {name}={same.get(name)}, not {value}: use another out=")
        fixed["arms"] = theirs["arms"] | arms
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"out={folder} exists and is not a study: use another out=, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_files.write_json(record, fixed)


@dataclass
class StudyRecord:
    """The part of study.json whose type is checked. The other settings are only compared for equality."""

    arms: dict[str, list[str]]


def read_record(path: Path) -> dict[str, Any]:
    """Return the settings in study.json. Raises MachineError if it is damaged."""
    try:
        theirs = parse_json(read_bytes(path, JSON_LIMIT), path)
        check(StudyRecord, theirs, path)
    except DamagedFile as error:
        raise MachineError(
            f"{error}: the record of this study is damaged; its runs beside it are intact, use another out="
        ) from None
    return dict(theirs)


def train(settings: StudyConfig, folder: Path, stages: tuple[str, ...], overrides: list[str]) -> None:
    """Train the stages of one run in a separate process, unless they are done. Raises MachineError if it fails."""
    run = Run(folder)
    if run.config_file.exists() and run.records().keys() >= set(stages):
        return
    say(f"{folder} ...")
    lists = [f"stages=[{','.join(stages)}]"] + ([f"plugins=[{','.join(settings.plugins)}]"] if settings.plugins else [])
    names = [f"recipe={settings.recipe}", f"run={folder}"]
    status = launch([*names, *settings.overrides, *lists, *overrides])
    if status:
        raise MachineError(f"{folder} ended with status {status}: see above; run the same command again to continue")


def score_point(settings: StudyConfig, arm: str, steps: int) -> dict[str, Any]:
    """Generate one image set per seed for an arm at `steps` steps, and score them.

    The result is stored in points/ and reused if it covers the same seeds.
    """
    kept = Path(settings.out) / "points" / f"{run_folder(settings, arm, 0).name}-{steps:04d}.json"
    if kept.exists():
        found = read_point(kept, arm)
        if found["protocol"]["seeds"] == settings.seeds:
            return found
    began = time.perf_counter()
    say(f"{arm}" + (f" at {steps} steps" if steps else ""))
    drawn, nfe, samplers = zip(*(generate_set(settings, arm, seed, steps) for seed in settings.seeds), strict=True)
    scored = score_tensors(
        {arm: list(drawn)},
        read_images(shards(settings), "train", settings.n_reference),
        read_images(shards(settings), "heldout", settings.n * len(settings.seeds)),
        seeds=settings.seeds,
        sampler=samplers[0],
        nfe=nfe[0],
        kid_subset_size=settings.kid_subset_size,
        kid_subsets=settings.kid_subsets,
        cache=Path(settings.out) / "cache",
        batch=settings.batch,
    )
    result = scored | {"seconds": time.perf_counter() - began}
    atomic_files.write_json(kept, result)
    return result


def read_point(path: Path, arm: str) -> dict[str, Any]:
    """Read the stored result of an arm at some number of steps. Raises MachineError if it is damaged."""
    try:
        found = read_result(path)
        check(Seconds, found.get("seconds"), f"{path}: seconds")
        for name, figures in {**found["floor"], arm: found["sets"].get(arm, {})}.items():
            if KID not in figures:
                raise DamagedFile(path, f"{name[:80]!r} has no {KID}")
    except (DamagedFile, UserError) as error:
        raise damaged_cache_file(path, error) from None
    return found


@cache
def read_images(place: Path, split: str, most: int) -> torch.Tensor:
    """Read up to `most` evenly spaced images of a split, (n, C, H, W) uint8. They are the same for all points."""
    images = Shards(place, split)
    return images.read(evenly_spaced(len(images), most))


def generate_set(settings: StudyConfig, arm: str, seed: int, steps: int) -> tuple[torch.Tensor, float, dict[str, Any]]:
    """Generate the images of an arm for one seed.

    Returns (images, nfe, sampler): images (n, C, H, W) uint8, network evaluations per image, and the sampler's
    settings. With 0 steps, the images are the VAE's before refinement. Raises UserError if the recipe has no VAE.
    """
    any_arm = next(iter(settings.arms))
    pipeline = pipelines.load(run_folder(settings, arm if steps else any_arm, seed), settings.batch)
    pipeline.use_sampler(steps=steps or 1)
    vae, refined = pipeline.generate(settings.n, seed)
    if steps:
        return refined, pipeline.nfe, {key: json_value(value) for key, value in asdict(pipeline.sampler.config).items()}
    if vae is None:
        raise UserError(
            f"recipe={settings.recipe} generates no images before refinement: use a recipe with a VAE, as a study "
            "compares with it"
        )
    return vae, 0.0, {}


def check_equivalence(settings: StudyConfig) -> dict[int, ImageDifference]:
    """Check for each seed that formulation 2 generates the images of formulation 1 (see equivalence.py).

    This uses the first arm whose refiner has x_hat as input. Without such an arm, the result is empty.
    """
    for arm in settings.arms:
        run = run_folder(settings, arm, settings.seeds[0])
        if Run(run).config().denoiser.condition_image:
            steps = min(settings.steps)
            return {seed: compare_formulations(run_folder(settings, arm, seed), steps, seed) for seed in settings.seeds}
    return {}


def seconds(settings: StudyConfig, points: StudyPoints) -> dict[str, float]:
    """Return the wall-clock seconds of training, from the records of the runs, and of generating and scoring."""
    spent = {f"training {name}": sum(training_seconds(settings, name)) for name in [GENERATOR, *settings.arms]}
    return spent | {"scoring": sum(p["seconds"] for arm in points.values() for p in arm.values())}


def training_seconds(settings: StudyConfig, name: str) -> list[float]:
    """Return the wall-clock seconds of each seed's run of an arm, from the records of its stages."""
    records = [Run(run_folder(settings, name, seed)).records() for seed in settings.seeds]
    return [sum(float(found["seconds"]) for stage, found in of.items() if stage in STAGES.names()) for of in records]
