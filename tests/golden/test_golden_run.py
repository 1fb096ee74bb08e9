"""The golden run: a tiny run of every trained stage, and of the tools on it, with known values.

When the package is restructured, what it computes must not change. So ten small runs and the tools on them are started
through the real commands (`golden_cases.py`), and what they write is compared with values that were recorded once: all
rows of metrics.jsonl, every tensor of the weights, the fragments of checkpoints and snapshots, the pixels of samples,
reconstructions and pictures, the figures of the evaluation, the order of the samples, the shards and the cache, the
resolved config, and the purposes that random numbers were drawn for. No module of the package is imported here. The
golden run depends on commands, recipe words and file formats alone, so it survives every move.

**What the values depend on.** Initial weights are drawn from torch's generator, which is seeded once before a run's
components are built one after the other: encoder, process, schedule, prior, refiner, denoiser, classifier.
(Discriminators, flows and judges have their own seeds.) So the weights depend on the order in which modules are built,
down to the order of the layers in `__init__`. The golden weights cover this order. They also cover the purposes of
keyed randomness; `test_purposes.py` says more about these.

**Bits.** On the machine of the record (`machine.json`: libraries, processor, kernels), all values must be equal bit for
bit. All runs ask for AVX2 kernels, so that processors differ less. On another machine, figures, weights and pixels must
agree within measured bounds (`golden_compare.py`); names, shapes, counts, configs and the order of samples must be
equal. To compare two checkouts bit for bit on any machine, use `renew.py --against`.

**If something is renamed**, enter it in `names.json` (`golden_names.py` describes it). The golden values stay as they
are. New settings and new records in stages.json are allowed. Bundles, reports and records of attempts are not compared.

**If behavior changes on purpose**, run `python tests/golden/renew.py` and read the differences. Then run it again with
`--yes-i-changed-behavior`, and give the reason in the commit.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import golden_answers as answers
import golden_store as store
import pytest
from golden_cases import CASES, Case
from golden_compare import differences
from golden_names import Names
from golden_run import collect, execute

SHOWN = 25
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Now:
    """The values of the code as it is now."""

    def __init__(self, folder: Path) -> None:
        self.names = Names.load()
        every = store.expansions(store.read(store.PURPOSES))
        keys = {f"{answers.key(purpose):016x}": purpose for purposes in every.values() for purpose in purposes}
        execute(folder, names=self.names)
        self.values = collect(folder, self.names, keys)
        machine = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
        self.exact = machine == store.read(store.MACHINE)
        self.known = set(keys.values())


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> Now:
    return Now(tmp_path_factory.mktemp("golden") / "runs")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return store.load()


@every_case
def test_the_run_leaves_what_it_left(case: Case, now: Now, golden: dict[str, Any]) -> None:
    found = differences(golden[case.name], now.values[case.name], case.precision, now.exact)
    kind = "bit for bit" if now.exact else "within the bounds for another machine"
    shown = "\n".join(found[:SHOWN])
    assert not found, f"{case.name}: {len(found)} values differ ({kind}):\n{shown}"


@every_case
def test_every_draw_has_a_purpose_of_the_table(case: Case, now: Now) -> None:
    assert set(now.values[case.name]["purposes"]) <= now.known


def test_every_entry_of_the_map_of_names_is_of_use(now: Now) -> None:
    assert [line for line in now.names.unused() if not line.startswith("functions")] == []


# -- that the comparison sees what it must -----------------------------------------------------------------------------


def test_the_golden_values_are_small() -> None:
    assert sum(path.stat().st_size for path in store.HERE.glob("*.json")) < store.LARGEST


def test_every_kind_of_value_is_compared(golden: dict[str, Any]) -> None:
    sections = {section for values in golden.values() for section in values}
    assert sections >= {
        "config", "rows", "records", "evaluation", "summary", "weights", "snapshots", "checkpoints", "pictures",
        "samples", "shards", "outputs", "purposes",
    }  # fmt: skip
    stages = {row.partition(" ")[0] for values in golden.values() for row in values.get("rows", {})}
    assert stages == {"encoder", "refiner", "classifier", "joint", "distil-1", "distil-2", "distil-4"}
    modules = {path.split("/")[-2] for values in golden.values() for path in values.get("checkpoints", {})}
    assert modules == stages | {"discriminator"}


def first(values: Any) -> str:
    return next(iter(values))


def changed(values: Any, *path: str) -> tuple[Any, Any]:
    """A copy, and in it what the path leads to."""
    made = copy.deepcopy(values)
    inner = made
    for name in path:
        inner = inner[name]
    return made, inner


@every_case
def test_the_same_values_do_not_differ(case: Case, golden: dict[str, Any]) -> None:
    for exact in (True, False):
        assert differences(golden[case.name], copy.deepcopy(golden[case.name]), case.precision, exact) == []


@pytest.mark.parametrize("name", ["guided", "bf16"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_change_is_seen_on_every_machine(name: str, exact: bool, golden: dict[str, Any]) -> None:
    """A figure that is off by a tenth, a first value of a tensor, and whatever is missing, new or of another shape."""
    own = golden[name]

    def seen(other: Any) -> list[str]:
        return differences(own, other, "bf16" if name == "bf16" else "fp32", exact)

    row = first(own["rows"])
    other, figures = changed(own, "rows", row)
    figures["loss"] *= 1.1
    assert [line.partition(":")[0] for line in seen(other)] == [f"/rows/{row}/loss"]
    other, figures = changed(own, "rows", row)
    figures["lr"] *= 1.0001
    assert len(seen(other)) == 1
    other, figures = changed(own, "rows")
    del figures[row]
    assert seen(other) == [f"/rows/{row}: is gone"]
    other, figures = changed(own, "rows", row)
    figures["another"] = 1.0
    assert seen(other) == [f"/rows/{row}/another: is new"]

    file = "weights/encoder.safetensors"
    tensor = next(key for key, line in own["weights"][file].items() if line.split()[2].count("x") == 3)
    _, kind, shape, mean, deviation, *values = own["weights"][file][tensor].split()
    size = (float(mean) ** 2 + float(deviation) ** 2) ** 0.5
    moved = [str(float(values[0]) + 0.5 * size), *values[1:]]
    for line in (
        ["0" * 16, kind, shape, mean, deviation, *moved],
        ["0" * 16, kind, "1x2x3", mean, deviation, *values],
        ["0" * 16, "float16", shape, mean, deviation, *values],
    ):
        other, weights = changed(own, "weights", file)
        weights[tensor] = " ".join(line)
        assert len(seen(other)) == 1
    other, weights = changed(own, "weights", file)
    weights[tensor] = " ".join(["0" * 16, kind, shape, mean, deviation, *values])
    assert len(seen(other)) == exact, "a digest alone may differ on another machine, and nowhere else"

    other, settings = changed(own, "config")
    settings["seed"] = "1"
    settings["a.new.setting"] = "1"
    assert seen(other) == ["/config/seed: golden '0', now '1'"]


def test_a_line_of_many_tensors_and_of_pixels_is_compared_everywhere(golden: dict[str, Any]) -> None:
    own = golden["guided"]
    file = first(own["checkpoints"])
    for kind, old, new in (("ema", " tensors ", " tensors 1"), ("exp_avg", "norm ", "norm 1")):
        other, fragments = changed(own, "checkpoints", file)
        fragments[kind] = fragments[kind].replace(old, new)
        assert len(differences(own, other, "fp32", exact=False)) == 1
    other, pictures = changed(own, "pictures")
    digest, kind, shape, mean, *rest = pictures["samples.png"].split()
    pictures["samples.png"] = " ".join([digest, kind, shape, str(float(mean) + 1.0), *rest])
    assert len(differences(own, other, "fp32", exact=False)) == 1


def test_renamed_things_keep_their_golden_names() -> None:
    names = Names(
        {
            "words": {"denoiser.center": "denoiser.centre", "train": "train_joint", "sample:images": "sample:n",
                      "joint.to=none": "joint.reaches=nothing"},
            "tensors": {"attn": "attention.qkv", "net": "refiner"},
            "files": {"optimizer": "checkpoints"},
        }
    )  # fmt: skip
    assert names.golden("tensors", "net.mid.attn.weight") == "refiner.mid.attention.qkv.weight"
    assert names.golden("tensors", "subnet.attn_norm.bias") == "subnet.attn_norm.bias"
    assert names.golden("files", "optimizer/encoder/a.safetensors") == "checkpoints/encoder/a.safetensors"
    assert names.golden_setting("denoiser.center", "none") == ("denoiser.centre", "none")
    assert names.golden_setting("train.ema.decay", "0.5") == ("train_joint.ema.decay", "0.5")
    assert names.golden_setting("joint.to", "none") == ("joint.reaches", "nothing")
    assert names.unused() == ["words: sample:images"]
    assert names.today("launch", "train_joint.ema.decay=0.5") == "train.ema.decay=0.5"
    assert names.today("launch", "joint.reaches=nothing") == "joint.to=none"
    assert names.today("launch", "joint.reaches=both") == "joint.reaches=both"
    assert names.today("sample", "n=4") == "images=4"
    assert names.today("edit", "n=4") == "n=4"
    assert names.unused() == []


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"tensor": {}}, "unknown section 'tensor'"),
        ({"tensors": {"a": "c", "b": "c"}}, "two names of 'tensors' have the same golden name"),
    ],
)
def test_a_map_that_cannot_be(table: dict[str, dict[str, str]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Names(table)


def test_two_names_must_not_become_one() -> None:
    with pytest.raises(ValueError, match=r"makes 'old.weight' of both 'old.weight' and 'new.weight'"):
        Names({"tensors": {"new": "old"}}).all_golden("tensors", ["old.weight", "new.weight"])
