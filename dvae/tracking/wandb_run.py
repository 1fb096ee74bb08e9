"""Weights & Biases as a mirror of metrics.jsonl. The only file that imports wandb, and only where it is switched on.

How a step that is taken twice reaches W&B once: W&B's client is a process of its own, which writes (offline) or uploads
(online) in batches, and a kill -9 of training ends it at once, so no note of ours could say what arrived. Instead each
session begins by asking W&B how far it holds each stage: offline, its own log files in the run folder; online, the
run's summary on the server. Rows of metrics.jsonl beyond that are sent again, rows up to it never. So after a kill W&B
holds every row once. A picture of the last seconds before the kill may be missing there; it lies in the run folder.
Online, rows that the server stored without the summary that follows them would be sent again: same step, same values.

Online never stops training: where the server cannot be reached, or takes nothing more, a session's data stay in its own
folder below the run folder's wandb/, and a line says how to send them; a later session that does reach the server sends
the figures by itself. wandb.json names the sessions whose data are on the disk alone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dvae.errors import MachineError, UserError, fold
from dvae.tracking import provenance
from dvae.tracking.console import say
from dvae.tracking.wandb_settings import WandbConfig, WandbMode
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, parse_json, read_json, read_yaml, require_regular
from dvae.utils.secrets import scrub

OPEN, CLOSE = 30.0, 60.0
"""Seconds that W&B's server has to open a run, and to take the last of what it was sent."""
BUNDLE = 1800.0
"""Seconds that it has to take a bundle too."""
BLOCK = 32768
"""Bytes of a block of W&B's own log files."""
RECORD_LIMIT = 2**26
"""Bytes of a record in them; a row of metrics has some thousand."""
GAVE_UP = b"filestream: fatal error"
"""What W&B's log says where the server refused figures; its client says it nowhere else."""


class WandbRun:
    """One session of a W&B run. Its id is kept in the run folder's wandb.json: every session continues the same run."""

    def __init__(self, run_folder: Path, config: WandbConfig, stage: str) -> None:
        """Open the run; its job type is the stage. Raises UserError where W&B refuses a run that has no figures yet."""
        import wandb

        self.folder, self.config, self.stage = run_folder, config, stage
        self._record = _record(run_folder)
        self._settings = _run_config(run_folder) | {"code": provenance.code(), "environment": provenance.environment()}
        self._image = wandb.Image
        self._sent: dict[str, int] = {}
        self._defined: set[str] = set()
        self.online, self._works = config.mode is WandbMode.online, True
        held_here = _held_here(run_folder, self._record["id"])  # before this session adds its own file
        wandb.setup(wandb.Settings(silent=True))  # what there is to tell is told here
        try:
            self._run: Any = self._open(config.mode)
        except wandb.errors.Error as error:
            wandb.teardown()
            why = fold(error)[:200]
            refused = isinstance(error, wandb.errors.AuthenticationError | wandb.errors.UsageError)
            refused = refused or re.search(r"returned error 4\d\d", why) is not None
            begun = (run_folder / "metrics.jsonl").exists()  # then training must not end for a key that has
            if not self.online or (refused and not begun):
                raise UserError(
                    f"tracking.wandb.mode={config.mode.value}: W&B did not open the run ({why}); "
                    "run `wandb login`, or use tracking.wandb.mode=offline"
                ) from None
            self.online = False
            say(f"W&B cannot be had ({why}): training goes on, and what W&B should get is kept offline")
            self._run = self._open(WandbMode.offline)
        self._held = _held_online(self._run.summary) if self.online else held_here
        if patch := provenance.diff():
            path = Path(self._run.dir) / "diff.patch"
            path.write_text(patch, encoding="utf-8")
            self._run.save(str(path), base_path=self._run.dir, policy="now")

    def _open(self, mode: WandbMode) -> Any:
        import wandb

        return wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            name=self.config.name or self.folder.resolve().name,
            group=self.config.group or self._settings.get("recipe"),
            job_type=self.stage,
            tags=self.config.tags,
            id=self._record["id"],
            resume="allow",
            mode=mode.value,
            dir=self.folder,
            config=self._settings,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,  # a remote's address may hold a token
                disable_code=True,
                x_disable_meta=True,  # so may the command line
                x_transaction_log_flush_interval=1.0,
                init_timeout=OPEN,
                finish_timeout=BUNDLE if self.config.bundle and self.stage == "evaluate" else CLOSE,
                finish_timeout_raises=True,
            ),
        )

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

    def summarize(self, figures: Mapping[str, float | None]) -> None:
        """Enter figures of the whole run, by full name, in the summary: what a sweep can optimize."""
        self._do(lambda run: run.summary.update(dict(figures)))

    def results(self, figures: Mapping[str, float | None], pictures: Iterable[Path], bundle: Path) -> None:
        """Send what an evaluation found as a table and as pictures; and the bundle, where the config asks for it."""
        import wandb

        table = wandb.Table(columns=["figure", "value"], data=[[name, value] for name, value in figures.items()])
        self._send(self.stage, 0, {"table": table} | {path.stem: self._image(str(path)) for path in pictures})
        if self.config.bundle:
            artifact = wandb.Artifact(f"{self._record['id']}-bundle", type="model")
            artifact.add_dir(str(bundle))
            self._do(lambda run: run.log_artifact(artifact))

    def close(self) -> None:
        """Wait until W&B has written or uploaded what it was given, and its helper process has ended."""
        import wandb

        here, log = Path(self._run.settings.sync_dir), Path(self._run.settings.log_internal)
        why = self._call(lambda run: run.finish()) if self._works else "its client failed"
        self._call(lambda run: wandb.teardown())  # finish alone returns before the helper lets go of the run's files
        if self.config.mode is not WandbMode.online:
            if why:
                say(f"W&B's files may lack figures ({why}); metrics.jsonl holds all")
            return
        if not self.online:
            why = why or "it could not be had"
        elif log.exists() and GAVE_UP in log.read_bytes():
            why = why or "it refused them"
        self._tell(here.name, why)

    def _tell(self, session: str, why: str) -> None:
        """Say how to send what W&B's server did not get, and why it did not; empty: it got all."""
        kept = self._record["kept"]
        if why:
            kept = [*kept, session]
            sync = " ".join(["wandb sync --include-online", *(str(self.folder / "wandb" / name) for name in kept)])
            say(f"W&B's server did not get all figures ({why}); they are kept, send them with: {sync}")
        elif kept:
            kept = []
            say("W&B can be had again, and was sent the figures that it lacked: nothing is left to sync")
        atomic_files.write_json(self.folder / "wandb.json", self._record | {"kept": kept})

    def _call(self, do: Callable[[Any], object]) -> str:
        """Have W&B do something. Returns why it did not, or nothing."""
        try:
            do(self._run)
        except Exception as error:  # noqa: BLE001 whatever it is, a mirror must not stop what it shows
            return fold(error) or type(error).__name__
        return ""

    def _do(self, do: Callable[[Any], object]) -> None:
        """Have W&B do something; where it fails, that is said, and it is asked no more in this session."""
        if self._works and (why := self._call(do)):
            say(f"W&B failed ({why}): training goes on, metrics.jsonl holds all")
            self._works = False

    def _last(self, stage: str) -> int:
        return max(self._held.get(stage, -1), self._sent.get(stage, -1))

    def _send(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        def send(run: Any) -> None:
            if stage not in self._defined:
                run.define_metric(f"{stage}/step", hidden=True)
                run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self._defined.add(stage)
            run.log({f"{stage}/step": step} | {f"{stage}/{key}": v for key, v in values.items()})

        self._do(send)


@dataclass
class WandbRecord:
    """wandb.json."""

    id: Annotated[str, Field(pattern=r"^[\w.-]{1,128}$")]
    """Id of the run, made at the first session; that of a trial comes from W&B's sweep agent."""
    kept: list[Annotated[str, Field(pattern=r"^[\w.:-]+$")]] = field(default_factory=list)
    """Folders of the sessions whose data are on the disk alone."""


def _record(run_folder: Path) -> dict[str, Any]:
    """What wandb.json holds, made if there is none. Raises MachineError for a damaged one."""
    path = run_folder / "wandb.json"
    if not path.exists():
        given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        atomic_files.write_json(path, {"id": given or secrets.token_hex(6), "kept": []})
    try:
        return asdict(read_json(path, WandbRecord))
    except DamagedFile as error:
        raise MachineError(f"{path}: holds no run id ({error.reason}); delete it to begin a new W&B run") from None


def _run_config(run_folder: Path) -> dict[str, Any]:
    """The run's config as it is written, for W&B's table of runs."""
    path = run_folder / "config.yaml"
    config = read_yaml(path) if path.exists() else {}
    scrubbed: dict[str, Any] = parse_json(scrub(json.dumps(config)), path)
    return scrubbed


def _held_online(summary: Any) -> dict[str, int]:
    """Last step of each stage by the server's summary, which a resumed run is given when it opens."""
    return {key.removesuffix("/step"): int(summary[key]) for key in list(summary.keys()) if key.endswith("/step")}


def _held_here(run_folder: Path, run_id: str) -> dict[str, int]:
    """Last step of each stage in the files that earlier sessions left, of either mode: each has what it was given."""
    held: dict[str, int] = {}
    for path in sorted(run_folder.glob(f"wandb/*run-*/run-{run_id}.wandb")):
        for row in offline_rows(path):
            for key, value in row.items():
                if key.endswith("/step"):
                    stage = key.removesuffix("/step")
                    held[stage] = max(_step(value, path), held.get(stage, -1))
    return held


def _step(value: Any, path: Path) -> int:
    if type(value) not in (int, float) or not 0 <= value < 2**63:
        raise _damaged(path, f"a step is {value!r:.40}")
    return int(value)


def offline_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The history rows of one of W&B's own log files; what a killed session left unfinished at its end is no row.

    Raises MachineError for a damaged file.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for data in _log_records(path):
        record = Record()
        try:
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): parse_json(item.value_json, path) for item in items}
        except (DecodeError, DamagedFile) as error:
            raise _damaged(path, fold(error)[:200]) from None


def _damaged(path: Path, reason: str) -> MachineError:
    return MachineError(f"{path}: is damaged ({reason}); move it away to go on, W&B may then hold rows twice")


def _log_records(path: Path) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format: 32 KiB blocks of chunks with header crc32, length, type.

    Only one record is in memory at a time, and none may have more than RECORD_LIMIT bytes.
    """
    require_regular(path)
    with path.open("rb") as file:
        if file.read(7) != b":W&B\xe1\xbe\x00":
            raise MachineError(
                f"{path}: not a W&B log of the known version; move it away to go on, W&B may then hold rows twice"
            )
        whole, first, middle, last = 1, 2, 3, 4
        position, record = 7, b""
        while True:
            rest = BLOCK - position % BLOCK
            if rest < 7:  # too little for a header: zeros up to the next block
                position += len(file.read(rest))
                if position % BLOCK:
                    return
                continue
            header = file.read(7)
            if len(header) < 7 or header == bytes(7):  # unfinished, or zeros that a lost machine left
                return
            _, length, kind = struct.unpack("<IHB", header)
            if kind not in (whole, first, middle, last) or length > rest - 7:
                raise _damaged(path, f"no chunk begins at byte {position}")
            chunk = file.read(length)
            if len(chunk) < length:
                return
            record = chunk if kind in (whole, first) else record + chunk
            if len(record) > RECORD_LIMIT:
                raise _damaged(path, f"a record has more than {RECORD_LIMIT} bytes")
            position += 7 + length
            if kind in (whole, last):
                yield record
