"""Known answers of all random draws: no purpose, seed or unkeyed draw is added, removed or renamed by accident.

A keyed draw is a pure function of (seed, purpose, number), so the text of a purpose is part of what a run computes. If
a purpose is renamed, every run that draws for it changes. `purposes.json` lists all purposes, what each of them draws,
and its first values for seed 0. Purposes that contain the name of a stage are listed for every stage. The table is
compared with the source, which is parsed and not imported (`golden_purposes.py`), and with a second implementation of
keyed randomness (`golden_answers.py`).

After an intended change, run `python tests/golden/renew.py --yes-i-changed-behavior`. Then describe what a new purpose
draws: replace its "?" in `purposes.json`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import golden_answers as answers
import golden_store as store
import pytest
from golden_names import Names
from golden_purposes import HOLE, Source
from tests_support import ROOT

TABLE = store.read(store.PURPOSES)
KNOWN = [(source, one) for source, every in store.expansions(TABLE).items() for one in every]


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(ROOT, Names.load())


def test_the_source_has_the_purposes_of_the_table(source: Source) -> None:
    found = {purpose: sorted(by) for purpose, by in source.purposes().items()}
    assert found == {purpose: entry["by"] for purpose, entry in TABLE["purposes"].items()}


def test_the_source_has_the_seeds_of_the_table(source: Source) -> None:
    assert source.seeds() == {call: entry["count"] for call, entry in TABLE["seeds"].items()}


def test_the_source_has_the_unkeyed_draws_of_the_table(source: Source) -> None:
    """Those of initial weights, whose order the golden run covers, and of benchmarks, where they do not matter."""
    assert source.unkeyed() == TABLE["unkeyed"]


def test_every_function_of_keyed_randomness_is_known(source: Source) -> None:
    assert {source.names.golden("functions", name) for name in source.functions} == set(answers.FUNCTIONS)
    assert [line for line in source.names.unused() if line.startswith("functions")] == []


@pytest.mark.parametrize(("purpose", "one"), KNOWN, ids=[one for _, one in KNOWN])
def test_known_answers(purpose: str, one: str, source: Source) -> None:
    """The table, a second implementation and the package agree, to the last bit."""
    module = importlib.import_module(source.keyed.dotted)
    today = {source.names.golden("functions", name): name for name in source.functions}
    entry = TABLE["purposes"][purpose]
    assert sorted(entry["values"][one]) == entry["by"]
    for function, known in entry["values"][one].items():
        assert answers.answer(function, one) == known
        assert answers.drawn(module, today[function], function, one) == known


def test_purposes_with_a_hole_are_listed_for_all_that_fills_it() -> None:
    for purpose, entry in TABLE["purposes"].items():
        assert list(entry["values"]) == store.filled(purpose, TABLE)


def test_every_trained_stage_has_its_purposes() -> None:
    """By the settings of trainings that a run has: a stage that is trained from now on has an order and data too."""
    trained = {key.split(".")[0] for key in store.load()["guided"]["config"] if key.startswith("train_")}
    assert {stage.replace("-", " ").split()[0] for stage in TABLE["stages"]} == {key[6:] for key in trained}
    for purpose in (f"{HOLE} order", f"{HOLE} data"):
        assert purpose in TABLE["purposes"]


def test_everything_says_what_it_draws() -> None:
    said = [entry["draws"] for entry in TABLE["purposes"].values()]
    said += [entry["seeds"] for entry in TABLE["seeds"].values()]
    assert all(len(text) > 10 for text in said)


# -- that the reading of the source sees what it must ------------------------------------------------------------------

KEYED = """
import numpy as np
def make(seed, purpose, number=0):
    return np.random.Generator(np.random.Philox(key=[seed, hash(purpose)]))
def normal(seed: int, purpose: str, samples: list[int]) -> object:
    return make(seed, purpose)
def _hidden(seed, purpose):
    return make(seed, purpose)
"""
USES = {
    "utils/__init__.py": "from dvae.utils.rng import normal",
    "plain.py": "from dvae.utils import rng\nrng.normal(0, 'plain', [1])\nrng.make(seed=0, purpose='by keyword')",
    "renamed.py": "from dvae.utils import rng as keys\nkeys.normal(0, f'stage {name} {3}', [])",
    "direct.py": "from dvae.utils.rng import make as draw\nWORD = 'word'\ndraw(0, WORD)\ndraw(0, f'{WORD} more')",
    "passed.py": "from .utils import normal as n\nn(0, 'a' + ' b' if x else 'c', [])",
    "constant.py": "import dvae.direct\nfrom dvae.utils import rng\nrng.make(0, dvae.direct.WORD)",
    "method.py": (
        "from dvae.utils import rng\nclass Noise:\n    def draw(self, purpose, shape):\n"
        "        return rng.normal(self.seed, purpose, shape)"
    ),
    "closure.py": (
        "def refine(noise, other):\n    def normal(what: str):\n        return noise.draw(what, 3)\n"
        "    return [normal('x_T'), lambda i: normal(f'step {i}'), other.draw(3, 4), other.draw(seed, 4)]"
    ),
    "function.py": (
        "from dvae.utils import rng\ndef order(seed, purpose):\n    return rng.make(seed, purpose)\norder(0, 'own')"
    ),
    "caller.py": "from dvae.function import order\norder(1, purpose='of another file')",
    "not_ours.py": "def normal(seed, purpose): ...\nnormal(0, 'no purpose at all')",
    "seeds.py": (
        "import random, torch, hashlib\nfrom dvae.utils import rng\nfrom dvae.direct import WORD\n"
        "torch.manual_seed(config.seed)\ntorch.manual_seed(rng.make(seed, WORD))\n"
        "random.seed(1)\nrandom.Random(n + 1)\n"
        "Mixture(random_state=seed % 7)\nf(generator=generator)\nhashlib.blake2b(x, key=b'split')\n"
        "torch.randn(3)\nweight.normal_()\nnoise.normal(3)"
    ),
}  # fmt: skip


def package(root: Path, more: dict[str, str] | None = None, names: Names | None = None) -> Source:
    """A package whose keyed randomness lies elsewhere and is called otherwise."""
    for name, text in (USES | {"__init__.py": "", "utils/rng.py": KEYED} | (more or {})).items():
        path = root / "dvae" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Source(root, names)


def test_purposes_are_found_however_they_are_given(tmp_path: Path) -> None:
    found = package(tmp_path)
    assert found.keyed.dotted == "dvae.utils.rng"
    assert found.functions.keys() == {"make", "normal"}
    assert found.purposes() == {
        "plain": {"normal"}, "by keyword": {"make"}, "stage {} {}": {"normal"}, "word": {"make"},
        "word more": {"make"}, "a b": {"normal"}, "c": {"normal"}, "x_T": {"normal"}, "step {}": {"normal"},
        "own": {"make"}, "of another file": {"make"},
    }  # fmt: skip


def test_seeds_are_found_and_their_variables_blanked(tmp_path: Path) -> None:
    found = package(tmp_path)
    assert found.seeds() == {
        "torch.manual_seed(_)": 1, "torch.manual_seed(keyed.make(_, 'word'))": 1, "random.seed(1)": 1,
        "random.Random(_ + 1)": 1, "Mixture(random_state=_ % 7)": 1, "blake2b(key=b'split')": 1,
        "np.random.Philox(key=[_, hash(_)])": 1,
    }  # fmt: skip
    assert found.unkeyed() == {"torch.randn": 1, "tensor.normal_": 1}


def test_renamed_functions_keep_their_golden_names(tmp_path: Path) -> None:
    text = "import torch\nfrom dvae.utils.rng import make as draw\ntorch.manual_seed(draw(seed, 'first weights'))"
    found = package(tmp_path, {"more.py": text}, Names({"functions": {"make": "generator"}}))
    assert found.purposes()["plain"] == {"normal"}
    assert found.purposes()["own"] == {"generator"}
    assert "torch.manual_seed(keyed.generator(_, 'word'))" in found.seeds()
    assert "torch.manual_seed(keyed.generator(_, 'first weights'))" in found.seeds()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rng.normal(0, names[3], [])", "cannot read the purpose"),
        ("rng.normal(0, self.purpose, [])", "cannot read the purpose"),
        ("rng.normal(0)", "called without a purpose"),
        ("rng.normal(*all)", "called without a purpose"),
        ("partial(rng.normal, 0, 'x')", "handed about"),
    ],
)
def test_a_purpose_that_cannot_be_read_is_an_error(text: str, says: str, tmp_path: Path) -> None:
    found = package(tmp_path, {"odd.py": f"from dvae.utils import rng\n{text}"})
    with pytest.raises(LookupError, match=says):
        found.purposes()


def test_there_is_one_module_of_keyed_randomness(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="2 modules make Philox generators"):
        package(tmp_path, {"second.py": KEYED})


def test_the_table_is_written_as_it_is_read() -> None:
    assert json.loads(store.text(TABLE)) == TABLE
