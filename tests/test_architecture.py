"""The structure of the package: the way imports run, what is unique, who may import or parse what."""

from __future__ import annotations

import ast
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
from tests_support import ROOT

PACKAGE = ROOT / "dvae"
LINKED = ("launchers", "recipes", "tools")
"""Folders of the top level that are part of the package through symlinks."""
MOST_LINES = 400
MOST_TOP_MODULES = 3


@dataclass(frozen=True)
class Source:
    """A file of the package."""

    name: str
    """Its path below dvae/, such as "layers/attention.py"."""
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Its dotted name, such as "dvae.layers.attention"."""
        return dotted(self.name)


def dotted(name: str) -> str:
    """The dotted name of a file or folder below dvae/."""
    parts = ["dvae", *name.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> tuple[Source, ...]:
    found = [(path.relative_to(PACKAGE).as_posix(), path) for path in PACKAGE.rglob("*.py")]
    for name in LINKED:  # rglob does not follow symlinks
        found += [(path.relative_to(ROOT).as_posix(), path) for path in (ROOT / name).rglob("*.py")]
    texts = {name: path.read_text(encoding="utf-8") for name, path in found}
    return tuple(Source(name, text, ast.parse(text)) for name, text in sorted(texts.items()))


# -- imports ----------------------------------------------------------------------------------------------------------


def imported(tree: ast.Module) -> set[str]:
    """Every name that a file imports, wherever the import stands: in a function or under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names |= {
                word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
            }
    return names


@cache
def graph() -> dict[str, set[str]]:
    """Module -> modules of dvae that it imports."""
    modules = {source.module for source in sources()}

    def module_of(name: str) -> str | None:
        """The module that an imported name is, or is defined in."""
        while name not in modules and "." in name:
            name = name.rpartition(".")[0]
        return name if name in modules else None

    found = {source.module: {module_of(name) for name in imported(source.tree)} for source in sources()}
    return {module: {one for one in names if one and one != module} for module, names in found.items()}


def layers() -> list[list[str]]:
    """The import order of docs/architecture.md, the only place where it is stated: the lowest layer first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- import order -->\n```\n(.*?)\n```", text, re.DOTALL)
    return [line.partition("#")[0].split() for line in block.splitlines()]


def layer_of(name: str, order: list[list[str]]) -> int:
    """The number of the layer that names a file, or else the longest folder that it lies in."""
    numbers = {place: number for number, places in enumerate(order) for place in places}
    place = name
    while place not in numbers:
        place = place.rpartition("/")[0]
        assert place, f"docs/architecture.md: the import order does not name {name}"
    return numbers[place]


def test_imports_run_one_way() -> None:
    order = layers()
    number = {source.module: layer_of(source.name, order) for source in sources()}
    wrong = [f"{module} imports {one}, which lies above it"
             for module, names in graph().items() for one in sorted(names) if number[one] > number[module]]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_the_import_order_names_what_exists_and_each_once() -> None:
    names = [name for layer in layers() for name in layer]
    assert len(set(names)) == len(names)
    lost = [name for name in names if not (PACKAGE / name).exists()]
    assert not lost, f"docs/architecture.md: the import order names {lost}, which do not exist"


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other in a circle (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in edges[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                found.append(circle)

    for module in edges:
        if module not in index:
            visit(module)
    return found


def test_no_import_circle_between_files() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles(graph()) == []


# -- sizes and names --------------------------------------------------------------------------------------------------


def test_files_and_functions_are_short() -> None:
    long = {source.name: count for source in sources() if (count := source.text.count("\n")) > MOST_LINES}
    assert not long, long
    functions = [node for source in sources() for node in ast.walk(source.tree)
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]  # fmt: skip
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for node in functions]
    assert statistics.median(lengths) < 10
    assert max(lengths) <= 60
    top = [source.name for source in sources() if "/" not in source.name]
    assert len(top) <= MOST_TOP_MODULES, top


def duplicates(pairs: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    places = defaultdict(list)
    for name, place in pairs:
        places[name].append(place)
    return {name: found for name, found in places.items() if len(found) > 1}


def test_class_names_are_unique() -> None:
    """A nested `Config` belongs to its component and is none of them."""
    found = duplicates(
        (node.name, source.name) for source in sources() for node in source.tree.body if isinstance(node, ast.ClassDef)
    )
    assert not found, found


def test_module_names_are_unique() -> None:
    """Commands (tools/) are named for what they do. Components are named by the user's words, unique within a kind."""
    kinds = {path.name for path in (PACKAGE / "registry").iterdir() if path.is_dir()}

    def named() -> Iterator[tuple[str, str]]:
        for source in sources():
            folder, _, file = source.name.rpartition("/")
            name = file.removesuffix(".py")
            if name not in ("__init__", "base") and folder != "tools":
                component = folder.startswith("registry/") and folder.rpartition("/")[2] in kinds
                yield name, "a component" if component else source.name

    found = {name: places for name, places in duplicates(named()).items() if set(places) != {"a component"}}
    assert not found, found


# -- who alone may ----------------------------------------------------------------------------------------------------
ONLY = {
    "xformers": {"layers/attention.py"},
    "deepspeed": {"training/engine/deepspeed_engine.py"},
    "wandb": {"tracking/wandb_run.py"},
    "torch_fidelity": {"evaluation/metrics.py"},
    "sweeps": {"experiments/sweeps/sweep_engine.py"},
    "submitit": {"launchers/slurm.py"},
    "gradio": {"app/page.py"},
}


@pytest.mark.parametrize("library", ONLY)
def test_a_library_has_one_importer(library: str) -> None:
    users = {one.name for one in sources() if library in {name.partition(".")[0] for name in imported(one.tree)}}
    assert users == ONLY[library]


PARSERS = {
    "json.load", "json.loads", "yaml.load", "yaml.safe_load", "OmegaConf.load", "np.load", "np.loadtxt", "torch.load",
    "load_file", "safe_open", "pickle.load", "pickle.loads", "Image.open", "zipfile.ZipFile", "tarfile.open",
}  # fmt: skip
"""Calls that read what somebody may have written."""
MAY_PARSE = {
    "utils/read.py": PARSERS,
    "utils/user_yaml.py": {"yaml.load"},  # files that the user wrote, with a safe loader
    "utils/weights.py": {"load_file"},  # after the header was checked
    "inference/directions/direction_files.py": {"safe_open"},  # likewise
    "training/engine/fragments.py": {"safe_open"},  # likewise
    "training/resilience/ranks.py": {"pickle.loads"},  # what ranks of this very run say to each other
    "evaluation/metrics.py": {"torch.load", "zipfile.ZipFile"},  # a package's weights, as plain tensors
    "data/archives.py": {"zipfile.ZipFile", "tarfile.open"},  # with bounds
    "data/shards/tar_files.py": {"tarfile.open"},  # the index of a shard that dvae has just written
    "data/images.py": {"Image.open"},  # of the intended formats, with a bound on the pixels
    "inference/generation/formats.py": {"zipfile.ZipFile"},  # written, not read
    "models/importers/checkpoint_file.py": {"zipfile.ZipFile"},  # its own bounded reader of checkpoints
    "registry/sources/mnist_5k.py": {"np.loadtxt"},  # a text whose size was checked
    "tracking/report.py": {"Image.open"},  # PNG alone, with a bound on the pixels
}
"""Files that may, and why."""


def called(tree: ast.Module) -> set[str]:
    """Names that a file calls: "json.loads", "load_file"."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_files_are_read_through_the_bounded_readers() -> None:
    seen = set()
    for source in sources():
        parsing = called(source.tree) & PARSERS
        seen |= parsing
        assert parsing <= MAY_PARSE.get(source.name, set()), (
            f"{source.name} calls {sorted(parsing)}: use dvae/utils/read.py"
        )
    assert {"json.loads", "yaml.load", "load_file"} <= seen


def test_launchers_recipes_and_tools_are_imported_as_parts_of_dvae() -> None:
    for source in sources():
        assert not {name.partition(".")[0] for name in imported(source.tree)} & set(LINKED), source.name
