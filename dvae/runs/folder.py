"""The run folder: everything about a run, and nothing outside it.

config.yaml        settings as they were when the run was submitted (dvae/config/stored.py)
run.json           format version of the folder, and the version of dvae that made it
attempts.jsonl     when it was started, where, and how that ended
stages.json        what is finished, with times and counts
metrics.jsonl      figures by stage and step
shards/            images to train on, if they are not elsewhere; damaged.json names images that cannot be read
remote/            shards that were fetched from elsewhere
latents/           what the stage cache writes
cache/             features of real images, for metrics
checkpoints/       resume state of the stage in progress
snapshots/         averages at steps of a stage, for tools/ema.py
weights/           averaged weights of finished stages (safetensors), and hashes.json with the hash of each
bundle/            what users run on
images/            pictures; samples.png and reconstructions.png beside it
nonfinite-*/       steps whose gradient was not finite, for tools/replay.py
samples-*.jsonl    numbers of the samples of each step, if data.log_samples is set
slurm/             jobs of the run on SLURM, with their logs
wandb/ wandb.json  files of W&B's client, and which W&B run this is
summary.json report.html
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dvae.config import stored
from dvae.config.schema import RunConfig
from dvae.errors import MachineError, UserError
from dvae.registry.stages.base import STAGES, run_config_class, stage_fields, training_fields
from dvae.runs import attempts
from dvae.runs.records import RECORDS, check_format, read_records, write_format
from dvae.utils import atomic_files
from dvae.utils.read import read_json, read_weights_header
from dvae.utils.weights import StateDict, load_weights, save_weights

MUTABLE_FIELDS = {
    "stages", "plugins", "dry_run", "run", "launcher", "tracking", "evaluate", "sampler", "cache", "data.threads",
    "data.workers", "data.cache_gib", "data.download_to", "data.download_gib", "data.log_samples", "max_hours",
}  # fmt: skip
"""Settings that may change from one attempt to the next: they do not touch what was trained (a cache refuses
others by itself)."""
MUTABLE_TRAINING_FIELDS = (
    "keep", "keep_every", "save_every", "preview_every", "zero_stage", "offload", "micro_batches", "nonfinite_skips",
    "ema.snapshot_every",
)  # fmt: skip
"""The same of each training."""


LINKS_ALLOWED = ("shards", "wandb")
"""Folders of a run that may be links, or hold some."""


class Run:
    """Paths and records of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.images = path / "images"
        self.bundle = path / "bundle"
        self.summary = path / "summary.json"
        self._records = path / RECORDS

    def config(self) -> RunConfig:
        """The settings as data: no plug-in is imported, no variable of the environment is read."""
        check_format(self.path)
        config = stored.load(self.config_file)
        config.run = str(self.path)  # where it lies now, whatever the file says
        return config

    def own_config(self) -> RunConfig:
        """The settings, for the processes of a launch: plug-ins are imported, the environment is read."""
        check_format(self.path)
        return stored.load_own(self.config_file)

    def weights(self, part: str) -> Path:
        return self.path / "weights" / f"{part}.safetensors"

    def has_weights(self, part: str) -> bool:
        """Whether the weights of a part are there, with their hash."""
        return self.weights(part).exists() and part in self._hashes()

    def save_weights(self, part: str, state: StateDict) -> None:
        """Keep weights of a part, complete or absent, and their hash."""
        save_weights(self.weights(part), state)
        atomic_files.write_json(self._hash_file, self._hashes() | {part: atomic_files.sha256(self.weights(part))})

    def load_weights(self, part: str) -> StateDict:
        """Weights of a part. Raises MachineError if they differ from their hash, UserError if they are missing."""
        path = self.weights(part)
        if not path.exists():
            raise UserError(f"run={self.path} has no trained {part} yet: add the stage that trains it to stages=[...]")
        read_weights_header(path)  # before the hash: the header tells how large the file may be
        if atomic_files.sha256(path) != self._hashes().get(part):
            raise MachineError(
                f"{path} does not match its hash in {self._hash_file}: the file is damaged: put back a copy, or use "
                "another run="
            )
        return load_weights(path)

    @property
    def _hash_file(self) -> Path:
        return self.path / "weights" / "hashes.json"

    def _hashes(self) -> dict[str, str]:
        return read_json(self._hash_file, dict[str, str]) if self._hash_file.exists() else {}

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def tidy(self) -> None:
        """Remove what a killed attempt left half-written; only while the folder is held.

        Raises DamagedFile for a folder in it that is a link (shards, which are only read, and W&B's own may be).
        """
        atomic_files.refuse_links(self.path, LINKS_ALLOWED)
        for folder in (self.path, self.path / "weights", self.images, self.path / "cache"):
            atomic_files.remove_leftovers(folder)

    def records(self) -> dict[str, dict[str, Any]]:
        """Finished stages, with what is worth knowing of each. Raises MachineError if the file is damaged."""
        return read_records(self.path)

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Enter a stage as finished."""
        atomic_files.write_json(self._records, self.records() | {stage: record})

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder against a second process; the hold ends with this process, however it ends."""
        with attempts.hold(self.path, attempts.WORKER):
            yield


def check_folder(config: DictConfig) -> None:
    """Raise UserError if the folder of a composed config cannot hold this run: it is another's, or not writable.

    Nothing is written.
    """
    run = Run(Path(str(config.run)))
    if run.config_file.exists():
        refuse_other(run, config)
        atomic_files.refuse_links(run.path, LINKS_ALLOWED)
    elif run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise UserError(f"run={run.path} exists and is not a run: use another run=, or remove it")
    there = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "is not writable" if there.is_dir() else "is a file"
        raise UserError(f"run={run.path} cannot be written ({there} {why}): use another run=")


def submit(config: DictConfig) -> Run:
    """The run folder for a composed config, made or taken up. Raises UserError as `check_folder` does."""
    check_folder(config)
    run = Run(Path(str(config.run)))
    kept = stored.stored(config)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.path):
            pass
        write_format(run.path)
        atomic_files.write_text(run.config_file, stored.to_yaml(kept))
    except OSError as error:
        raise UserError(f"run={run.path} cannot be written ({error.strerror}): use another run=") from None
    return run


def refuse_other(run: Run, config: DictConfig) -> None:
    """Raise UserError if the folder holds a run with other settings, or of another format.

    Fields of a stage that was not installed before, or is not any more, are passed over: the run does not have it.
    """
    check_format(run.path)
    before, now = _settings(stored.read_plain(run.config_file)), _settings(stored.stored(config))
    if before.get("recipe") != now.get("recipe"):
        raise UserError(
            f"run={run.path} belongs to recipe {before.get('recipe')!r}, not {now.get('recipe')!r}: use another run="
        )
    in_both = {_top(key) for key in before} & {_top(key) for key in now}
    of_stages = {field for name in STAGES.names() for field in stage_fields(STAGES.get(name))}
    always = {field.name for field in fields(run_config_class())} - of_stages
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and _top(key) in in_both | always:
            raise UserError(
                f"run={run.path} was made with {key}={before.get(key)}, now {now.get(key)}: use another run=, "
                "or take back the change"
            )


def _top(key: str) -> str:
    return key.partition(".")[0]


def _settings(plain: dict[str, Any]) -> dict[str, Any]:
    """Flat settings that must stay as they are through a run's life."""
    flat: dict[str, Any] = {}
    mutable = MUTABLE_FIELDS | {f"{training}.{name}" for training in training_fields()
                                for name in MUTABLE_TRAINING_FIELDS}  # fmt: skip

    def walk(prefix: str, value: Any) -> None:
        if prefix in mutable:
            return
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    walk("", plain)
    if flat.get("data.shards") == f"{plain.get('run')}/shards":
        del flat["data.shards"]  # inside the run folder, which may have been moved
    return flat
