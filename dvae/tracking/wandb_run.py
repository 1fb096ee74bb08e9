"""Mirror metrics.jsonl to Weights & Biases.

This is the only file that imports wandb, and it does so only if W&B is enabled.

**W&B holds every row once, even if training is killed and repeats steps.** W&B's client is a separate process. It
writes (offline) or uploads (online) in batches, and kill -9 of training ends it at once. dvae therefore cannot record
by itself which rows have arrived. Instead, each session first asks W&B for the last step that it holds of each stage:

- Offline, dvae reads W&B's log files in the run folder.
- Online, dvae reads the summary of the run on the server.

The session sends the rows of metrics.jsonl after that step, and none before it. There are two limits:

- A picture of the last seconds before the kill may be missing in W&B. It is still in the run folder.
- Online, the server may have stored rows but not yet the summary. These rows are sent again, with the same steps and
  values.

**A failure of W&B's server never stops training.** If the server cannot be reached or takes no more data, the data of
the session stay in their folder below wandb/ in the run folder. A line says how to send them. A later session that
reaches the server sends the missing metrics itself. wandb.json lists the sessions whose data are only on the disk.
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
"""Timeouts in seconds: to open a run, and to send the remaining data at its end."""
BUNDLE = 1800.0
"""Timeout in seconds to send the remaining data if they include a bundle."""
BLOCK = 32768
"""Bytes of a block in W&B's log files."""
RECORD_LIMIT = 2**26
"""Maximum size of a record in W&B's log files, in bytes. A row of metrics has about a thousand."""
GAVE_UP = b"filestream: fatal error"
"""The text in W&B's internal log if the server rejected metrics. The client reports this nowhere else."""


class WandbRun:
    """One session of a W&B run.

    wandb.json in the run folder stores the id of the W&B run, so all sessions continue the same run.
    """

    def __init__(self, run_folder: Path, config: WandbConfig, stage: str) -> None:
        """Open the W&B run. Its job type is `stage`.

        Raises UserError if W&B rejects the run before metrics.jsonl exists, or if an offline run cannot be opened.
        """
        import wandb

        self.folder, self.config, self.stage = run_folder, config, stage
        self._record = _record(run_folder)
        self._settings = _run_config(run_folder) | {"code": provenance.code(), "environment": provenance.environment()}
        self._image = wandb.Image
        self._sent: dict[str, int] = {}
        self._defined: set[str] = set()
        self.online, self._works = config.mode is WandbMode.online, True
        held_here = _held_here(run_folder, self._record["id"])  # read before this session adds its own file
        wandb.setup(wandb.Settings(silent=True))  # dvae prints the messages itself
        try:
            self._run: Any = self._open(config.mode)
        except wandb.errors.Error as error:
            wandb.teardown()
            why = fold(error)[:200]
            refused = isinstance(error, wandb.errors.AuthenticationError | wandb.errors.UsageError)
            refused = refused or re.search(r"returned error 4\d\d", why) is not None
            begun = (run_folder / "metrics.jsonl").exists()  # a run that has begun must not end for an expired API key
            if not self.online or (refused and not begun):
                raise UserError(
                    f"tracking.wandb.mode={config.mode.value}: W&B did not open the run ({why}); "
                    "run `wandb login`, or use tracking.wandb.mode=offline"
                ) from None
            self.online = False
            say(f"W&B is not available ({why}): training goes on, and its data for W&B are kept offline")
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
                disable_git=True,  # the URL of a remote may contain a token
                disable_code=True,
                x_disable_meta=True,  # the metadata include the command line, which may contain a secret
                x_transaction_log_flush_interval=1.0,
                init_timeout=OPEN,
                finish_timeout=BUNDLE if self.config.bundle and self.stage == "evaluate" else CLOSE,
                finish_timeout_raises=True,
            ),
        )

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Send one row as "<stage>/<name>", unless W&B already holds that step."""
        if step > self._last(stage):
            self._send(stage, step, metrics)
            self._sent[stage] = step

    def image(self, stage: str, step: int, name: str, path: Path) -> None:
        """Send a PNG file as "<stage>/<name>", unless W&B held this step or a later one when the session began.

        Call this after `log` for the same step. If the picture came first and the session were killed before the row,
        W&B would hold the step without its row, and the row would never be sent.
        """
        if step > self._held.get(stage, -1):
            self._send(stage, step, {name: self._image(str(path))})

    def catch_up(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Send the rows of metrics.jsonl that W&B lacks."""
        for row in rows:
            figures = {key: v for key, v in row.items() if key not in ("stage", "step")}
            self.log(row["stage"], row["step"], figures)

    def summarize(self, figures: Mapping[str, float | None]) -> None:
        """Write metrics of the whole run, by full name, to the W&B summary. A sweep can optimize them."""
        self._do(lambda run: run.summary.update(dict(figures)))

    def results(self, figures: Mapping[str, float | None], pictures: Iterable[Path], bundle: Path) -> None:
        """Send the results of an evaluation as a table, and its pictures. Send the bundle too if `config.bundle`."""
        import wandb

        table = wandb.Table(columns=["figure", "value"], data=[[name, value] for name, value in figures.items()])
        self._send(self.stage, 0, {"table": table} | {path.stem: self._image(str(path)) for path in pictures})
        if self.config.bundle:
            artifact = wandb.Artifact(f"{self._record['id']}-bundle", type="model")
            artifact.add_dir(str(bundle))
            self._do(lambda run: run.log_artifact(artifact))

    def close(self) -> None:
        """Wait until W&B has written or uploaded all data, and its helper process has ended."""
        import wandb

        here, log = Path(self._run.settings.sync_dir), Path(self._run.settings.log_internal)
        why = self._call(lambda run: run.finish()) if self._works else "its client failed"
        # finish() returns before W&B's helper process has closed the files of the run; teardown() ends the process.
        self._call(lambda run: wandb.teardown())
        if self.config.mode is not WandbMode.online:
            if why:
                say(f"W&B's files may lack metrics ({why}); metrics.jsonl holds all rows")
            return
        if not self.online:
            why = why or "it was not available"
        elif log.exists() and GAVE_UP in log.read_bytes():
            why = why or "it rejected them"
        self._tell(here.name, why)

    def _tell(self, session: str, why: str) -> None:
        """Update the list of unsent sessions in wandb.json, and print how to send them.

        Args:
            session: The name of the folder of this session.
            why: Why the server did not receive all data; "" if it did.
        """
        kept = self._record["kept"]
        if why:
            kept = [*kept, session]
            sync = " ".join(["wandb sync --include-online", *(str(self.folder / "wandb" / name) for name in kept)])
            say(f"W&B's server did not receive all metrics ({why}); they are kept, send them with: {sync}")
        elif kept:
            kept = []
            say("W&B is available again and has received the missing metrics: nothing is left to sync")
        atomic_files.write_json(self.folder / "wandb.json", self._record | {"kept": kept})

    def _call(self, do: Callable[[Any], object]) -> str:
        """Call do(run). Returns the error as text, or "" if there is none."""
        try:
            do(self._run)
        except Exception as error:  # noqa: BLE001 no error of W&B may stop training
            return fold(error) or type(error).__name__
        return ""

    def _do(self, do: Callable[[Any], object]) -> None:
        """Call do(run). After the first error, print it and send nothing more in this session."""
        if self._works and (why := self._call(do)):
            say(f"W&B failed ({why}): training goes on, metrics.jsonl holds all rows")
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
    """The content of wandb.json."""

    id: Annotated[str, Field(pattern=r"^[\w.-]{1,128}$")]
    """The id of the W&B run, created by the first session. For a trial of a sweep, W&B's sweep agent gives it."""
    kept: list[Annotated[str, Field(pattern=r"^[\w.:-]+$")]] = field(default_factory=list)
    """Folders of the sessions whose data are only on the disk."""


def _record(run_folder: Path) -> dict[str, Any]:
    """Read wandb.json, and create it if it is missing. Raises MachineError if it is damaged."""
    path = run_folder / "wandb.json"
    if not path.exists():
        given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        atomic_files.write_json(path, {"id": given or secrets.token_hex(6), "kept": []})
    try:
        return asdict(read_json(path, WandbRecord))
    except DamagedFile as error:
        raise MachineError(f"{path}: holds no run id ({error.reason}); delete it to begin a new W&B run") from None


def _run_config(run_folder: Path) -> dict[str, Any]:
    """Return the stored config of the run without secrets, for W&B's table of runs."""
    path = run_folder / "config.yaml"
    config = read_yaml(path) if path.exists() else {}
    scrubbed: dict[str, Any] = parse_json(scrub(json.dumps(config)), path)
    return scrubbed


def _held_online(summary: Any) -> dict[str, int]:
    """Return the last step of each stage in the server's summary, which W&B passes on when a run is resumed."""
    return {key.removesuffix("/step"): int(summary[key]) for key in list(summary.keys()) if key.endswith("/step")}


def _held_here(run_folder: Path, run_id: str) -> dict[str, int]:
    """Return the last step of each stage in the log files of earlier sessions.

    Online sessions write such files too. Each file holds all that its session was given.
    """
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
    """Yield the history rows of one of W&B's log files.

    An incomplete record at the end, which a killed session left, is ignored. Raises MachineError if the file is
    damaged.
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
    """Yield the records of a file in LevelDB's log format.

    The file consists of 32 KiB blocks of chunks. Each chunk has a 7-byte header: crc32 (4 bytes), length (2), type (1).
    A record is one chunk, or a first chunk, any number of middle chunks and a last chunk.

    Only one record is in memory at a time. Raises MachineError for a record of more than RECORD_LIMIT bytes.
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
            if rest < 7:  # no room for a header: the rest of the block is zeros
                position += len(file.read(rest))
                if position % BLOCK:
                    return
                continue
            header = file.read(7)
            if len(header) < 7 or header == bytes(7):  # an incomplete header, or zeros that a crashed machine left
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
