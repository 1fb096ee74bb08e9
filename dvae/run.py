"""The run folder: everything about a run, and nothing outside it.

config.yaml        resolved when the run was submitted
attempts.jsonl     when it was started, where, and how that ended
stages.json        what is finished, with times and counts
metrics.jsonl      figures by stage and step
checkpoints/       resume state of the stage in progress
snapshots/         averages at steps of a stage, for tools/ema.py
weights/           averaged weights of finished stages (safetensors)
bundle/            what users run on
images/            pictures; samples.png and reconstructions.png beside it
summary.json report.html
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dvae import attempts, files
from dvae import config as configuration
from dvae.errors import UserError
from dvae.settings import TRAININGS, RunConfig

FREE = {
    "stages", "plugins", "dry_run", "run", "launcher", "tracking", "evaluate", "sampler", "cache", "data.threads",
    "data.workers", "data.cache_gib", "data.download_to", "data.download_gib", "data.log_samples", "max_hours",
} | {
    f"{training}.{name}"
    for training in TRAININGS
    for name in (
        "keep", "keep_every", "save_every", "preview_every", "zero_stage", "offload", "micro_batches",
        "nonfinite_skips", "ema.snapshot_every",
    )
}  # fmt: skip
"""Settings that may change from one attempt to the next: they do not touch what was trained (a cache refuses
others by itself)."""


class Run:
    """Paths and records of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.images = path / "images"
        self.bundle = path / "bundle"
        self.summary = path / "summary.json"
        self._records = path / "stages.json"

    def config(self) -> RunConfig:
        return configuration.load(self.config_file)

    def weights(self, part: str) -> Path:
        return self.path / "weights" / f"{part}.safetensors"

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def tidy(self) -> None:
        """Remove what a killed attempt left half-written; only while the folder is held."""
        for folder in (self.path, self.path / "weights", self.images, self.path / "cache"):
            files.remove_leftovers(folder)

    def records(self) -> dict[str, dict[str, Any]]:
        """Finished stages, with what is worth knowing of each."""
        return json.loads(self._records.read_text(encoding="utf-8")) if self._records.exists() else {}

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Enter a stage as finished."""
        files.write_json(self._records, self.records() | {stage: record})

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder against a second process; the hold ends with this process, however it ends."""
        with attempts.hold(self.path, attempts.WORKER):
            yield


def submit(config: DictConfig) -> Run:
    """The run folder for `config`, made or taken up. Raises UserError where it is not this run's or not writable."""
    run = Run(Path(str(config.run)))
    if run.config_file.exists():
        refuse_other(run, config)
    elif run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise UserError(f"run={run.path} exists and is not a run: use another run=, or remove it")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.path):
            pass
        files.write_text(run.config_file, configuration.to_yaml(config))
    except OSError as error:
        raise UserError(f"run={run.path} cannot be written ({error.strerror}): use another run=") from None
    return run


def refuse_other(run: Run, config: DictConfig) -> None:
    """Raise UserError where the folder holds a run with other settings."""
    before, now = _settings(OmegaConf.load(run.config_file)), _settings(config)
    if before.get("recipe") != now.get("recipe"):
        raise UserError(
            f"run={run.path} belongs to recipe {before.get('recipe')!r}, not {now.get('recipe')!r}: use another run="
        )
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"run={run.path} was made with {key}={before.get(key)}, now {now.get(key)}: use another run=, "
                "or take back the change"
            )


def _settings(config: Any) -> dict[str, Any]:
    """Flat settings that must stay as they are through a run's life."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if prefix in FREE:
            return
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    walk("", plain)
    if flat.get("data.shards") == f"{plain.get('run')}/shards":
        del flat["data.shards"]  # inside the run folder, which may have been moved
    return flat
