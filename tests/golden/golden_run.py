"""Run the golden commands on a checkout, and collect what they left as plain values."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from golden_cases import CASES, OUT, commands, write_images
from golden_names import Names
from PIL import Image
from safetensors import safe_open
from tests_support import ROOT, environment

HERE = Path(__file__).parent
LEFT_OUT = ("time", "seconds", "images_per_second", "refined_images_per_second", "settings", "encoder_sha256")
"""Figures that are never compared: times and speeds; the repr of settings, because the config is compared itself; and
hashes of whole files, because they change with the names of tensors."""
NOT_OURS = ("points.png",)
"""Pictures that matplotlib draws. They are left out because their pixels depend on its version."""
KERNELS = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell",
} if platform.machine() == "x86_64" else {}  # fmt: skip
"""Kernels that all x86-64 processors of today can run: with them, fewer machines differ in the last bits."""
CHOOSING = ("ATEN_CPU_CAPABILITY", "ONEDNN_", "DNNL_", "MKL_", "OPENBLAS_", "NPY_", "GLIBC_TUNABLES")
"""Beginnings of the names of environment variables that choose kernels."""
Values = dict[str, Any]


def execute(
    folder: Path,
    tree: Path = ROOT,
    names: Names | None = None,
    apart: bool = False,
    kernels: Mapping[str, str] = KERNELS,
) -> None:
    """Run every golden command in `folder` by the code of `tree`; `apart` gives each a process of its own.

    Without `names` the words are not translated. Raises RuntimeError with the last lines of the output if a command
    fails.
    """
    folder.mkdir(parents=True)
    write_images(folder / "images")
    wanted = commands()
    if names:
        wanted = [(names.tool(tool), [names.today(tool, word) for word in words]) for tool, words in wanted]
    drawn = []
    for number, batch in enumerate([[each] for each in wanted] if apart else [wanted]):
        given, said = folder / f"commands-{number}.json", folder / f"purposes-{number}.json"
        given.write_text(json.dumps(batch), encoding="utf-8")
        words = [str(HERE / "golden_driver.py"), str(tree.resolve()), given.name, said.name, "machine.json"]
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=own_environment(tree, kernels), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            last = "\n".join(done.stdout.strip().splitlines()[-12:])
            raise RuntimeError(f"a golden command failed with exit status {done.returncode}:\n{last}")
        drawn += json.loads(said.read_text(encoding="utf-8"))
    (folder / "drawn.json").write_text(json.dumps(drawn), encoding="utf-8")


def own_environment(tree: Path, kernels: Mapping[str, str]) -> dict[str, str]:
    """The environment of a golden run: one thread in every library, no GPU, the package of `tree`, these kernels."""
    kept = {name: value for name, value in environment().items() if not name.startswith(CHOOSING)}
    one = dict.fromkeys(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
    more = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tree.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | one | more | dict(kernels)


def collect(folder: Path, names: Names, purposes: Mapping[str, str]) -> dict[str, Values]:
    """By case, all values that the commands left in `folder`, under golden names.

    `purposes` maps keys of keyed randomness to purposes; an unknown key is kept as it is.
    """
    drawn: dict[str, set[str]] = {case.name: set() for case in CASES}
    seen = json.loads((folder / "drawn.json").read_text(encoding="utf-8"))
    for (_, words), keys in zip(commands(), seen, strict=True):
        name = next(word.removeprefix("run=") for word in words if word.startswith("run="))
        drawn[name.split("-")[1] if name.startswith(OUT) else name] |= {purposes.get(key, key) for key in keys}
    known: dict[str, str] = {}
    return {
        case.name: of_run(folder / case.name, names, known)
        | {"outputs": outputs(folder, case.name, names), "purposes": sorted(drawn[case.name])}
        for case in CASES
    }


def of_run(run: Path, names: Names, known: dict[str, str]) -> Values:
    """All values of one run folder. `known` holds digests of the weights files that were collected before."""
    every = files(run, names)
    summary = read_json(every.get("summary.json"))
    evaluated = {name: value for name, value in summary.get("figures", {}).items() if name.startswith("evaluate/")}
    found: Values = {
        "config": config(every["config.yaml"], names),
        "rows": rows(every.get("metrics.jsonl"), names),
        "records": figures(read_json(every.get("stages.json")), names),
        "evaluation": figures(summary.get("evaluation", {}), names),
        "summary": figures(evaluated, names),
        "weights": {
            name: weights(path, f"{run.name}/{name}", names, known)
            for name, path in chosen(every, "weights/", ".safetensors")
        },
        "snapshots": {name: whole_file(path, names) for name, path in chosen(every, "snapshots/", ".safetensors")},
        "checkpoints": {name: by_kind(path, names) for name, path in chosen(every, "checkpoints/", ".safetensors")},
        "pictures": {
            name: array(np.asarray(Image.open(path)))
            for name, path in chosen(every, "", ".png")
            if path.name not in NOT_OURS
        },
        "samples": {name: sample_log(path) for name, path in chosen(every, "samples-", ".jsonl")},
        "shards": {name: tar(path) for name, path in chosen(every, "", ".tar")},
    }
    return {name: value for name, value in found.items() if value}


def files(run: Path, names: Names) -> dict[str, Path]:
    """The files of a run folder by their golden names, in the order of these; hidden ones are left out."""
    found = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    staged = names.all_golden("stages", [name for name in found if not name.startswith(".")])
    return {golden: found[staged[name]] for golden, name in sorted(names.all_golden("files", staged).items())}


def chosen(every: Mapping[str, Path], begin: str, end: str) -> list[tuple[str, Path]]:
    """The files whose golden names begin and end so, without those of the bundle."""
    return [
        (name, path)
        for name, path in every.items()
        if name.startswith(begin) and name.endswith(end) and not name.startswith("bundle/")
    ]


def outputs(folder: Path, run: str, names: Names) -> Values:
    """What tools wrote about a run: arrays, weights files, and the JSON of tools or beside their pictures."""
    found: Values = {}
    for path in sorted(folder.glob(f"{OUT}{run}-*")):
        name = path.name.removeprefix(OUT)
        if path.suffix == ".npy":
            found[name] = array(np.load(path))
        elif path.suffix == ".safetensors":
            found[name] = whole_file(path, names)
        elif path.suffix == ".json":
            told = {key: value for key, value in read_json(path).items() if key not in ("request", "versions")}
            found[name] = figures(told, names)
    return found


# -- text files --------------------------------------------------------------------------------------------------------


def read_json(path: Path | None) -> Any:
    """What a JSON file holds; nothing if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in nested dicts and lists of dicts; a list of plain values is one value."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def figures(value: Any, names: Names) -> Values:
    """Flat figures under golden names, without times and speeds."""
    flat = {name: item for name, item in leaves(value) if name.replace("/", ".").split(".")[-1] not in LEFT_OUT}
    staged = names.all_golden("stages", flat)
    return {golden: flat[staged[name]] for golden, name in names.all_golden("figures", staged).items()}


def rows(path: Path | None, names: Names) -> Values:
    """Figures by stage and step ("encoder 1"), in the order of the file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    found: Values = {}
    for row in map(json.loads, lines):
        key = f"{names.golden('stages', row.pop('stage'))} {row.pop('step')}"
        if key in found:
            raise ValueError(f"{path}: {key} is there twice")
        found[key] = figures(row, names)
    return found


def config(path: Path, names: Names) -> dict[str, str]:
    """The resolved config, flat: golden key -> value as text."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False, enum_to_str=True)
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in leaves(plain)}
    pairs = [names.golden_setting(key, value) for key, value in words.items()]
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{path}: names.json makes one key of two")
    return dict(sorted(found.items()))


def sample_log(path: Path) -> Values:
    """Which images each step has seen: the first step in full, and a digest of all."""
    every = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    told = [[row["step"], row["samples"], row["indices"]] for row in every]
    return {"steps": len(told), "first": told[0][2], "sha256": digest(json.dumps(told).encode())}


# -- tensors and pixels ------------------------------------------------------------------------------------------------


def digest(*parts: bytes) -> str:
    """The first 64 bits of a SHA-256, in hex: enough to tell any two files of this project apart."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def number(value: float) -> str:
    return f"{float(value):.5g}"


def array(values: np.ndarray) -> str:
    """One line: digest, dtype, shape, mean, standard deviation, and some values.

    The values are sixteen that are spread evenly over pixels (uint8), or the first four of anything else.
    """
    values = np.ascontiguousarray(values)
    flat = values.ravel()
    even = flat.dtype == np.uint8
    few = flat[np.linspace(0, flat.size - 1, 16).astype(int)] if even and flat.size else flat[:4]
    shape = "x".join(map(str, values.shape)) or "scalar"
    wide = flat.astype(np.float64)
    middle = [number(wide.mean()), number(wide.std())] if flat.size else []
    return " ".join([digest(values.tobytes()), str(values.dtype), shape, *middle, *map(number, few)])


def tensors(path: Path, names: Names) -> dict[str, np.ndarray]:
    """Golden name -> values of a safetensors file, in the order of golden names."""
    with safe_open(path, framework="numpy") as file:
        every = names.all_golden("stages", file.keys())
        golden = names.all_golden("tensors", every)
        return {name: file.get_tensor(every[golden[name]]) for name in sorted(golden)}


def weights(path: Path, called: str, names: Names, known: dict[str, str]) -> Values | str:
    """A line for each tensor. If a file collected before has the same tensors, the name of that file instead."""
    found = {name: array(value) for name, value in tensors(path, names).items()}
    whole = digest(json.dumps(found).encode())
    first = known.setdefault(whole, called)
    return found if first == called else f"same as {first}"


def whole(named: Mapping[str, np.ndarray]) -> str:
    """One line for many tensors: digest, how many, how many values, and their norm."""
    parts = [
        part for name, value in named.items() for part in (name.encode(), str(value.shape).encode(), value.tobytes())
    ]
    size = sum(value.size for value in named.values())
    norm = sum(float(np.square(value.astype(np.float64)).sum()) for value in named.values()) ** 0.5
    return f"{digest(*parts)} {len(named)} tensors {size} values norm {number(norm)}"


def whole_file(path: Path, names: Names) -> str:
    return whole(tensors(path, names))


def by_kind(path: Path, names: Names) -> Values:
    """A checkpoint's fragments: a line for each kind of values (weight, exp_avg, ema, ...), and their layout."""
    kinds: dict[str, dict[str, np.ndarray]] = {}
    with safe_open(path, framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118 # it is no dict
            kind, _, name = key.partition(":")
            golden = names.golden("tensors", names.golden("stages", name))
            if golden in kinds.setdefault(kind, {}):
                raise ValueError(f"{path}: names.json makes {golden!r} of two tensors")
            kinds[kind][golden] = file.get_tensor(key)
        layout = json.loads(file.metadata()["layout"])
    told = {
        names.golden("tensors", names.golden("stages", name)): [about["start"], about["shape"], about["step"]]
        for name, about in layout.items()
    }
    found = {kind: whole(dict(sorted(named.items()))) for kind, named in sorted(kinds.items())}
    steps = sorted({about[2] for about in told.values()})
    return found | {"layout": digest(json.dumps(sorted(told.items())).encode()), "optimizer steps": steps}


def tar(path: Path) -> str:
    """One line for the members of a tar file: digest of their content, how many, and the mean of their numbers.

    PNGs are decoded, so that another zlib makes no difference.
    """
    parts, total, size, count = [], 0.0, 0, 0
    with tarfile.open(path) as file:
        for member in file:
            data = file.extractfile(member)
            assert data is not None, member.name
            content, values = data.read(), None
            if member.name.endswith(".png"):
                values = np.asarray(Image.open(io.BytesIO(content)))
            elif member.name.endswith(".npy"):
                values = np.load(io.BytesIO(content))
            if values is not None:
                content, total, size = values.tobytes(), total + float(values.sum()), size + values.size
            parts += [member.name.encode(), content]
            count += 1
    return f"{digest(*parts)} {count} members {size} values mean {number(total / max(size, 1))}"
