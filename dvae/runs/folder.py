"""The run folder. It holds everything that a run writes:

config.yaml        settings of the last launch (dvae/config/stored.py)
run.json           format version of the folder, and the version of dvae that wrote it
attempts.jsonl     time, place and end of every attempt
stages.json        finished stages, with times and counts
metrics.jsonl      metrics by stage and step
shards/            training images, unless data.shards is elsewhere
damaged.json       images that cannot be read
remote/            fetched remote shards
latents/           output of the stage cache
cache/             features of real images, for metrics
checkpoints/       state from which a stage resumes
snapshots/         snapshots of averaged weights, for tools/ema.py
weights/           averaged weights of finished stages (safetensors), and hashes.json with the hash of each file
bundle/            the trained models, for inference
images/            pictures, except samples.png and reconstructions.png, which are in the run folder itself
nonfinite-*/       steps whose gradient was not finite, for tools/replay.py
samples-*.jsonl    sample numbers of each step, if data.log_samples is set
slurm/             SLURM jobs of the run, with their logs
wandb/ wandb.json  files of the W&B client, and the ID of the W&B run
summary.json       results of the stage evaluate
report.html        results of the run on one page
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dvae.config import stored
from dvae.config.schema import RunConfig
from dvae.errors import MachineError, UserError
from dvae.registry.stages.base import STAGES, DeclaredStage, refuse_unloaded_stages, stage_fields, training_fields
from dvae.runs import attempts
from dvae.runs.records import RECORDS, check_format, read_records, write_format
from dvae.utils import atomic_files
from dvae.utils.read import read_json, read_weights_header
from dvae.utils.weights import StateDict, load_weights, save_weights

MUTABLE_FIELDS = {
    "stages", "plugins", "dry_run", "run", "launcher", "tracking", "evaluate", "sampler", "data.threads",
    "data.workers", "data.cache_gib", "data.download_to", "data.download_gib", "data.log_samples", "max_hours",
}  # fmt: skip
"""Settings that may change between attempts, because trained weights do not depend on them. A cache checks its own."""
MUTABLE_TRAINING_FIELDS = (
    "keep", "keep_every", "save_every", "preview_every", "zero_stage", "offload", "micro_batches", "nonfinite_skips",
    "ema.snapshot_every",
)  # fmt: skip
"""Settings of each training that may change between attempts."""


LINKS_ALLOWED = ("shards", "wandb")
"""Folders in a run folder that may be symbolic links or contain them."""


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
        """Return the settings as data. No plug-in is imported, and no environment variable is read.

        Raises UserError if the folder is not a readable run folder.
        """
        check_format(self.path)
        config = stored.load(self.config_file)
        config.run = str(self.path)  # the folder may have been moved since the file was written
        return config

    def own_config(self) -> RunConfig:
        """Return the settings for the processes of a launch. Plug-ins are imported, and environment variables are read.

        Raises UserError if the folder is not a readable run folder.
        """
        check_format(self.path)
        return stored.load_own(self.config_file)

    def weights(self, part: str) -> Path:
        return self.path / "weights" / f"{part}.safetensors"

    def has_weights(self, part: str) -> bool:
        """Return whether the weights of a part are saved, with their hash."""
        return self.weights(part).exists() and part in self._hashes()

    def save_weights(self, part: str, state: StateDict) -> None:
        """Save the weights of a part, then their hash. If the process is killed, no incomplete file remains."""
        save_weights(self.weights(part), state)
        atomic_files.write_json(self._hash_file, self._hashes() | {part: atomic_files.sha256(self.weights(part))})

    def load_weights(self, part: str) -> StateDict:
        """Load the weights of a part.

        Raises UserError if they are missing, and MachineError if they do not match their hash.
        """
        path = self.weights(part)
        if not path.exists():
            raise UserError(f"run={self.path} has no trained {part} yet: add the stage that trains it to stages=[...]")
        read_weights_header(path)  # it checks the file size, so a huge file is rejected before it is hashed
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
        """Remove the incomplete files of a killed attempt. The caller must hold the folder (`held`).

        Raises DamagedFile if a folder in the run folder is a symbolic link. Only the folders in LINKS_ALLOWED may be
        links: shards are only read, and W&B creates links in its own folder.
        """
        atomic_files.refuse_links(self.path, LINKS_ALLOWED)
        for folder in (self.path, self.path / "weights", self.images, self.path / "cache"):
            atomic_files.remove_leftovers(folder)

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the record of each finished stage. Raises MachineError if the file is damaged."""
        return read_records(self.path)

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Record a stage as finished."""
        atomic_files.write_json(self._records, self.records() | {stage: record})

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock of the folder while the block runs, so that no other process works in it.

        The kernel releases the lock when this process ends, even if it is killed. Raises UserError if another process
        holds the lock.
        """
        with attempts.hold(self.path, attempts.WORKER):
            yield


def check_folder(config: DictConfig) -> None:
    """Raise UserError if the run folder of a composed config belongs to another run, or is not writable.

    Nothing is written.
    """
    run = Run(Path(str(config.run)))
    if not str(config.run).isprintable():
        raise UserError(f"run={config.run!r}: use a name of printable characters")
    if run.config_file.exists():
        refuse_other(run, config)
        atomic_files.refuse_links(run.path, LINKS_ALLOWED)
    elif os.path.lexists(run.path) and (not run.path.is_dir() or any(run.path.iterdir())):
        raise UserError(f"run={run.path} exists and is not a run: use another run=, or remove it")
    there = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "is not writable" if there.is_dir() else "is a file"
        raise UserError(f"run={run.path} cannot be written ({there} {why}): use another run=")


def submit(config: DictConfig) -> Run:
    """Create the run folder of a composed config, or reuse the existing one, and write its settings.

    Raises UserError if `check_folder` does, or if the folder cannot be written.
    """
    check_folder(config)
    run = Run(Path(str(config.run)))
    kept = kept_settings(config)
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

    Fields of a stage that was not registered before are not compared, because the run cannot have used this stage.
    """
    check_format(run.path)
    plain = stored.read_plain(run.config_file)
    refuse_unloaded_stages(run.config_file, plain)
    before, now = _settings(plain), _settings(kept_settings(config))
    if before.get("recipe") != now.get("recipe"):
        raise UserError(
            f"run={run.path} belongs to recipe {before.get('recipe')!r}, not {now.get('recipe')!r}: use another run="
        )
    new = {field for stage in _plugin_stages() for field in stage_fields(stage)} - plain.keys()
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key.partition(".")[0] not in new:
            raise UserError(
                f"run={run.path} was made with {key}={before.get(key)}, now {now.get(key)}: use another run=, "
                "or take back the change"
            )


def kept_settings(config: DictConfig) -> dict[str, Any]:
    """Return the settings as config.yaml keeps them: all but those of plug-ins' stages that the run never had.

    So a run does not depend on a plug-in that is installed but that it does not use.
    """
    kept = stored.stored(config)
    path = Run(Path(str(config.run))).config_file
    before = stored.read_plain(path) if path.exists() else {}
    for stage in _plugin_stages():
        if STAGES.name_of_class(stage) not in config.stages:
            for field in stage_fields(stage).keys() - before.keys():
                kept.pop(field, None)
    return kept


def _plugin_stages() -> list[type[DeclaredStage]]:
    """Return the stages that dvae does not bring itself."""
    stages = [STAGES.get(name) for name in STAGES.names()]
    return [stage for stage in stages if not stage.__module__.startswith("dvae.")]


def _settings(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change between attempts: dotted name -> value."""
    flat: dict[str, Any] = {}
    of_stages = {field for name in STAGES.names() for field in STAGES.get(name).mutable}
    mutable = MUTABLE_FIELDS | of_stages | {f"{training}.{name}" for training in training_fields()
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
        del flat["data.shards"]  # it depends on the path of the run folder, which may have been moved
    return flat
