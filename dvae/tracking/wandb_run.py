"""Weights & Biases as a mirror of metrics.jsonl. The only file that imports wandb, and only where it is switched on.

How a step that is taken twice reaches W&B once: W&B's client is a process of its own, which writes (offline) or uploads
(online) in batches, and a kill -9 of training ends it at once, so no note of ours could say what arrived. Instead each
session begins by asking W&B how far it holds each stage: offline, its own log files in the run folder; online, the
run's summary on the server. Rows of metrics.jsonl beyond that are sent again, rows up to it never. So after a kill W&B
holds every row once. A picture of the last seconds before the kill may be missing there; it lies in the run folder.
Online, rows that the server stored without the summary that follows them would be sent again: same step, same values.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dvae import files
from dvae.errors import MachineError, UserError, one_line


class WandbMode(Enum):
    """Whether and where W&B is used."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases. Log in with `wandb login` or WANDB_API_KEY: a key has no place in a config."""

    mode: WandbMode = WandbMode.disabled
    """online, offline (files in the run folder; `wandb sync` sends them) or disabled."""
    project: str = "dvae"
    """Project of the run."""
    name: str | None = None
    """Name of the run; by default that of its folder."""
    entity: str | None = None
    """User or team; by default that of the login."""
    group: str | None = None
    """Group of the run."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""


class WandbRun:
    """One session of a W&B run. Its id is kept in the run folder's wandb.json: every session continues the same run."""

    def __init__(self, run_folder: Path, config: WandbConfig) -> None:
        """Open the run. Raises UserError where W&B cannot be reached or knows no login."""
        import wandb

        run_id = _run_id(run_folder)
        held_offline = _held_offline(run_folder, run_id)  # before this session adds its own file
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,  # a remote's address may hold a token
            disable_code=True,
            x_disable_meta=True,  # so may the command line
            x_transaction_log_flush_interval=1.0,
        )
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or run_folder.resolve().name,
                group=config.group,
                tags=config.tags,
                id=run_id,
                resume="allow",
                mode=config.mode.value,
                dir=run_folder,
                config=_run_config(run_folder),
                settings=settings,
            )
        except wandb.errors.Error as error:
            wandb.teardown()
            raise UserError(
                f"tracking.wandb.mode={config.mode.value}: W&B did not open the run ({one_line(error)}); "
                "run `wandb login`, or use tracking.wandb.mode=offline"
            ) from None
        self._image = wandb.Image
        self._held = held_offline if config.mode is WandbMode.offline else _held_online(self._run.summary)
        self._sent: dict[str, int] = {}
        self._defined: set[str] = set()

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Send one row as "<stage>/<name>", unless W&B holds that step already."""
        if step > self._last(stage):
            self._send(stage, step, metrics)
            self._sent[stage] = step

    def image(self, stage: str, step: int, name: str, path: Path) -> None:
        """Send a PNG as "<stage>/<name>", unless W&B held this step or a later one when the session began.

        Goes after the row of its step: a session killed between the two leaves W&B with a step that has no row.
        """
        if step > self._held.get(stage, -1):
            self._send(stage, step, {name: self._image(str(path))})

    def catch_up(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Send those of metrics.jsonl's rows that W&B lacks."""
        for row in rows:
            figures = {key: v for key, v in row.items() if key not in ("stage", "step")}
            self.log(row["stage"], row["step"], figures)

    def close(self) -> None:
        """Wait until W&B has written or uploaded what it was given, and its helper process has ended."""
        import wandb

        self._run.finish()
        wandb.teardown()  # finish alone returns before the helper lets go of the run's files and id

    def _last(self, stage: str) -> int:
        return max(self._held.get(stage, -1), self._sent.get(stage, -1))

    def _send(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        if stage not in self._defined:
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._defined.add(stage)
        self._run.log({f"{stage}/step": step} | {f"{stage}/{key}": v for key, v in values.items()})


def _run_id(run_folder: Path) -> str:
    """The id kept in wandb.json, made at the first session."""
    path = run_folder / "wandb.json"
    if not path.exists():
        files.write_json(path, {"id": secrets.token_hex(6)})
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (ValueError, KeyError, TypeError):
        raise MachineError(f"{path}: holds no run id; delete it to begin a new W&B run") from None


def _run_config(run_folder: Path) -> dict[str, Any]:
    """The run's resolved config, for W&B's table of runs."""
    path = run_folder / "config.yaml"
    return OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}  # type: ignore[return-value]


def _held_online(summary: Any) -> dict[str, int]:
    """Last step of each stage by the server's summary, which a resumed run is given when it opens."""
    return {key.removesuffix("/step"): int(summary[key]) for key in list(summary.keys()) if key.endswith("/step")}


def _held_offline(run_folder: Path, run_id: str) -> dict[str, int]:
    """Last step of each stage in the files that offline sessions left."""
    held: dict[str, int] = {}
    for path in sorted(run_folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")):
        for row in offline_rows(path):
            for key, value in row.items():
                if key.endswith("/step"):
                    stage = key.removesuffix("/step")
                    held[stage] = max(int(value), held.get(stage, -1))
    return held


def offline_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The history rows of one of W&B's own log files; what a killed session left unfinished at its end is no row."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for data in _log_records(path):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _log_records(path: Path) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format: 32 KiB blocks of chunks with header crc32, length, type."""
    data = path.read_bytes()
    if data[:7] != b":W&B\xe1\xbe\x00":
        raise MachineError(
            f"{path}: not a W&B log of the known version; move it away to go on, W&B may then hold rows twice"
        )
    whole, first, last = 1, 2, 4
    position, record = 7, b""
    while position + 7 <= len(data):
        rest = 32768 - position % 32768
        if rest < 7:
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7
        if position + length > len(data):
            return
        chunk = data[position : position + length]
        record = chunk if kind in (whole, first) else record + chunk
        position += length
        if kind in (whole, last):
            yield record
