"""Run folders that a stranger could hand over: damaged, edited, or with something else in the place of a file.

`hostile_runs()` yields pairs (name, mutate). `mutate(folder)` changes a copy of a small finished run folder, which has
the stages encoder and refiner, their checkpoints, weights/ and a bundle. Whatever a tool then does with the folder, it
succeeds or says in one line why not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

Mutate = Callable[[Path], object]


class HostileRun(NamedTuple):
    """One case."""

    name: str
    mutate: Mutate


def hostile_runs() -> Iterator[HostileRun]:
    """All cases; each has another name."""
    yield from files_that_are_none()
    yield from texts()
    yield from values()
    yield from rows()
    yield from checkpoints()
    yield from folders()
    yield from names()


# --- helpers


def written(folder: Path, name: str, text: str | bytes) -> None:
    """Write a file, and the folders around it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(path)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()


def write(name: str, text: str | bytes) -> Mutate:
    """The change that writes `text` into a file."""
    return lambda folder: written(folder, name, text)


def instead(name: str, make: Callable[[Path], object]) -> Mutate:
    """The change that puts something else in the place of a file or folder."""

    def mutate(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        remove(folder / name)
        make(folder / name)

    return mutate


def edit(name: str, change: Callable[[Any], Any]) -> Mutate:
    """The change that applies `change` to the values of a JSON file."""

    def mutate(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return mutate


def put(value: Any, place: tuple[Any, ...], item: Any) -> Any:
    """`value` with `item` at a place in it."""
    if not place:
        return item
    changed: Any = list(value) if isinstance(value, list) else dict(value)
    changed[place[0]] = put(
        changed.get(place[0], {}) if isinstance(changed, dict) else changed[place[0]], place[1:], item
    )
    return changed


def newest(folder: Path, stage: str = "refiner") -> Path:
    """The newest checkpoint of a stage."""
    return max((folder / "checkpoints" / stage).glob("step-*"))


# --- something else in the place of a file

RECORDS = (
    "config.yaml", "run.json", "stages.json", "attempts.jsonl", "metrics.jsonl", "summary.json", "weights/hashes.json",
    "wandb.json", "slurm/jobs.json",
)  # fmt: skip
"""Files that tools parse; the last two are not there in every run."""
KINDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.touch(),
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("/nonexistent/file"),
    "a link to a folder": lambda path: path.symlink_to("/"),
    "a tebibyte of nothing": lambda path: path.touch() or os.truncate(path, 2**40),
    "64 MiB of zeros": lambda path: path.write_bytes(bytes(2**26)),
    "64 MiB of brackets": lambda path: path.write_bytes(b"[" * 2**26),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe{\x00}\x00"),
}
PICTURES = ("images/heldout.png", "images/vae_samples.png", "samples.png")
WEIGHTS = ("weights/encoder.safetensors", "weights/denoiser.safetensors", "weights/prior.safetensors")


def files_that_are_none() -> Iterator[HostileRun]:
    for name in (*RECORDS, *PICTURES, *WEIGHTS, "report.html", ".lock", ".attempt"):
        for kind, make in KINDS.items():
            if name != "config.yaml" or kind != "missing":  # then it is no run
                yield HostileRun(f"{name} is {kind}", instead(name, make))


# --- texts that are no record

TEXTS = {
    "a number": "3", "null": "null", "a list": "[]", "a list of lists": "[[[]]]", "text": '"text"', "nothing": "{}",
    "half": '{"a": ', "a key twice": '{"a": 1, "a": 2}', "NaN": "NaN", "a number of 5000 digits": "9" * 5000,
    "deep lists": "[" * 10_000 + "]" * 10_000, "deep mappings": '{"a":' * 10_000 + "1" + "}" * 10_000,
    "a terminal's codes": '{"\\u001b[2J": "\\u001b]0;x\\u0007"}', "a tag": '{"<script>alert(1)</script>": 1}',
    "a byte order mark": "\ufeff{}", "two values": "{} {}", "a zero byte": "{\x00}", "a lone half": '{"\\ud800": 1}',
}  # fmt: skip
YAMLS = {
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "an alias of itself": "a: &a [*a]\n",
    "a tag that runs": "a: !!python/object/apply:os.system [touch PWNED]\n", "two documents": "a: 1\n---\nb: 2\n",
    "keys that are no text": "1: 2\n", "an interpolation of itself": "a: ${a}\n", "a variable": "a: ${oc.env:HOME}\n",
    "tabs": "a:\n\t- b\n",
}  # fmt: skip


def texts() -> Iterator[HostileRun]:
    for name in RECORDS:
        for what, text in TEXTS.items():
            yield HostileRun(f"{name} holds {what}", write(name, text))
    for what, text in YAMLS.items():
        yield HostileRun(f"config.yaml holds {what}", write("config.yaml", text))
        yield HostileRun(f"config.yaml ends with {what}", partial(appended, text=text))


def appended(folder: Path, text: str) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text() + text)


# --- values of the wrong type or size

WRONG: list[Any] = [
    None,
    True,
    "x",
    "",
    -1,
    0,
    3.5,
    1e308,
    10**30,
    [],
    [1],
    {},
    {"a": 1},
    "\x1b[2J",
    "../x",
    "x" * 10**5,
]
PLACES: dict[str, list[tuple[Any, ...]]] = {
    "run.json": [("format",), ("dvae",)],
    "stages.json": [("encoder",), ("encoder", "seconds"), ("refiner", "steps"), ("refiner", "images_per_second"),
                    ("refiner", "parameters"), ("evaluate",), ("nothing_like_this",)],
    "summary.json": [("recipe",), ("stages",), ("stages", "encoder"), ("stages", "encoder", "seconds"), ("figures",),
                     ("figures", "refiner/loss"), ("evaluation",), ("evaluation", "sets"), ("evaluation", "protocol"),
                     ("evaluation", "reconstructions"), ("evaluation", "reconstructions", "psnr")],
    "weights/hashes.json": [("encoder",), ("denoiser",), ("../../x",)],
}  # fmt: skip
ATTEMPT = ("started", "host", "pid", "launcher", "count", "cwd", "job", "ended", "status", "message")
JOB = {"id": "12", "stages": ["encoder"], "submitted": 1.0}


def values() -> Iterator[HostileRun]:
    for name, places in PLACES.items():
        for place in places:
            for item in WRONG:
                called = f"{name}: {'.'.join(map(str, place))} is {shown(item)}"
                yield HostileRun(called, edit(name, partial(put, place=place, item=item)))
    for field in ATTEMPT:
        for item in WRONG:
            yield HostileRun(f"attempts.jsonl: {field} is {shown(item)}", partial(attempt, field=field, item=item))
    for field in JOB:
        for item in WRONG:
            text = json.dumps([JOB | {field: item}])
            yield HostileRun(f"slurm/jobs.json: {field} is {shown(item)}", write("slurm/jobs.json", text))
    for item in WRONG:
        for field, whole in (("id", {"id": item}), ("kept", {"id": "abc", "kept": item})):
            yield HostileRun(f"wandb.json: {field} is {shown(item)}", write("wandb.json", json.dumps(whole)))


def shown(item: Any) -> str:
    return repr(item)[:20]


def attempt(folder: Path, field: str, item: Any) -> None:
    """Change the last row of attempts.jsonl."""
    path = folder / "attempts.jsonl"
    *before, last = path.read_text().splitlines()
    path.write_text("\n".join([*before, json.dumps(json.loads(last) | {field: item})]) + "\n")


# --- metrics.jsonl

ROW: dict[str, Any] = {"stage": "refiner", "step": 6, "time": 1.7e9, "loss": 0.5, "images_per_second": 100.0}
ROWS: dict[str, str] = {
    "no time": json.dumps({name: ROW[name] for name in ROW if name != "time"}),
    "only a step": json.dumps({"stage": "refiner", "step": 3}),
    "a stage that the run has not": json.dumps(ROW | {"stage": "classifier"}),
    "a stage that nothing has": json.dumps(ROW | {"stage": "nothing like this"}),
    "a stage that is a tag": json.dumps(ROW | {"stage": "<script>alert(1)</script>"}),
    "a stage with codes for a terminal": json.dumps(ROW | {"stage": "\x1b[2J"}),
    "a round of a stage": json.dumps(ROW | {"stage": "distil-4"}),
    "a step beyond the last": json.dumps(ROW | {"step": 10**15}),
    "a step of 200 digits": json.dumps(ROW | {"step": 10**200}),
    "a key twice": '{"stage": "refiner", "step": 1, "step": 2}',
    "no object": "3",
    "nothing": "",
    "half": '{"stage": "refiner", "st',
    "much": json.dumps(ROW | {"note": "x" * 10**6}),
    "many keys": json.dumps(ROW | {f"k{number}": 0.0 for number in range(20_000)}),
    "the largest numbers": json.dumps(ROW | {"loss": 1.7e308, "kl": -1.7e308, "loss_t1": 5e-324}),
    "a slash": json.dumps(ROW | {"stage": "refiner/loss"}),
}


def rows() -> Iterator[HostileRun]:
    for what, line in ROWS.items():
        yield HostileRun(f"metrics.jsonl ends with {what}", partial(added, line=line.encode(), first=False))
        yield HostileRun(f"metrics.jsonl begins with {what}", partial(added, line=line.encode(), first=True))
    for field in ROW:
        for item in WRONG:
            line = json.dumps(ROW | {field: item}).encode()
            yield HostileRun(f"metrics.jsonl: {field} is {shown(item)}", partial(added, line=line, first=False))
    yield HostileRun("metrics.jsonl ends with no UTF-8", partial(added, line=b"\xff\xfe", first=False))
    yield HostileRun("metrics.jsonl has no last line break", lambda folder: cut(folder / "metrics.jsonl"))


def added(folder: Path, line: bytes, first: bool) -> None:
    path = folder / "metrics.jsonl"
    old = path.read_bytes()
    path.write_bytes(line + b"\n" + old if first else old + line + b"\n")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


# --- checkpoints


def checkpoints() -> Iterator[HostileRun]:
    for name in ("hashes.json", "state.json", "refiner/rank-00000.safetensors"):
        for kind, make in KINDS.items():
            yield HostileRun(f"checkpoint: {name} is {kind}", partial(in_checkpoint, name=name, make=make))
    for name in ("hashes.json", "state.json"):
        for what, text in TEXTS.items():
            make = partial(Path.write_bytes, data=text.encode())
            yield HostileRun(f"checkpoint: {name} holds {what}", partial(in_checkpoint, name=name, make=make))
    for name in ("../../../config.yaml", "/etc/hostname", "nothing", "..", ".", "", "refiner"):
        yield HostileRun(f"checkpoint: it lists {name!r}", partial(listing, name=name))
    for item in WRONG:
        yield HostileRun(f"checkpoint: a hash is {shown(item)}", partial(listing, name="state.json", digest=item))
    yield HostileRun("checkpoint: a file more", lambda folder: (newest(folder) / "more").touch())
    yield HostileRun("checkpoint: a pipe more", lambda folder: os.mkfifo(newest(folder) / "more"))
    yield HostileRun("checkpoint: a loop of links", lambda folder: (newest(folder) / "x").symlink_to(newest(folder)))
    yield HostileRun("checkpoint: it is a file", partial(as_file, which=newest))
    yield HostileRun("checkpoint: it is a link to a folder outside", linked_checkpoint)
    for name in ("step-abc", "step-", "step-1", "step-99999999999999999999", "step-00000009.old", "step-\n1"):
        yield HostileRun(
            f"checkpoint: one is called {name!r}", lambda folder, n=name: (newest(folder).parent / n).mkdir()
        )
    yield HostileRun(
        "checkpoints of the stage are a file", partial(as_file, which=lambda folder: newest(folder).parent)
    )
    yield HostileRun("all checkpoints are damaged", all_damaged)


def in_checkpoint(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    instead(name, make)(newest(folder))


def listing(folder: Path, name: str, digest: Any = "ab" * 32) -> None:
    path = newest(folder) / "hashes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: digest}))


def as_file(folder: Path, which: Callable[[Path], Path]) -> None:
    path = which(folder)
    shutil.rmtree(path)
    path.write_text("nothing")


def linked_checkpoint(folder: Path) -> None:
    path = newest(folder)
    outside = folder.parent / f"{folder.name}-outside"
    path.rename(outside)
    path.symlink_to(outside)


def all_damaged(folder: Path) -> None:
    for path in folder.glob("checkpoints/*/*/state.json"):
        path.write_text("{")


# --- folders

FOLDERS = (
    "images",
    "weights",
    "checkpoints",
    "bundle",
    "shards",
    "snapshots",
    "wandb",
    "slurm",
    "cache",
    "report.html",
)


def folders() -> Iterator[HostileRun]:
    for name in FOLDERS:
        for kind in ("missing", "empty", "a folder", "a pipe", "a link to itself", "a link to nothing"):
            yield HostileRun(f"{name}/ is {kind}", instead(name, KINDS[kind]))
    yield HostileRun("a run in the run", lambda folder: shutil.copytree(folder, folder / "inner"))
    yield HostileRun("a link to the run in the run", lambda folder: (folder / "inner").symlink_to(folder))
    yield HostileRun("weights of two parts are exchanged", exchanged)
    for name in ("encoder", "denoiser", "prior"):
        yield HostileRun(
            f"weights of {name} are cut off", lambda folder, n=name: cut(folder / f"weights/{n}.safetensors")
        )
        yield HostileRun(f"weights of {name} are text", write(f"weights/{name}.safetensors", "hello"))
        yield HostileRun(f"weights of {name} claim 2^60 numbers", partial(vast, name=name))


def exchanged(folder: Path) -> None:
    one, other, aside = (folder / "weights" / f"{name}.safetensors" for name in ("encoder", "denoiser", "aside"))
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def vast(folder: Path, name: str) -> None:
    about = {"w": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}}
    header = json.dumps(about).encode()
    (folder / "weights" / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


# --- names that files should not have


def names() -> Iterator[HostileRun]:
    for name in ("line\nbreak", "\x1b[2J", "é" * 80, "..x", "-rf", "$(touch PWNED)", ".hidden.tmp", "config.yaml.old"):
        yield HostileRun(f"a file is called {name!r}", lambda folder, n=name: (folder / n).touch())
        yield HostileRun(f"an image is called {name!r}", lambda folder, n=name: (folder / "images" / n).touch())
    yield HostileRun("a name that is no UTF-8", lambda folder: os.close(os.open(bytes(folder) + b"/\xff", os.O_CREAT)))
    for name in ("step-x-width-1.safetensors", "step-00000001-width-abc.safetensors", "step-1-decay-1.2.3.safetensors"):
        yield HostileRun(f"a snapshot is called {name}", write(f"snapshots/refiner/{name}", ""))
    yield HostileRun("a temporary folder is a link", lambda folder: (folder / ".x.tmp").symlink_to(folder))
