"""Find every purpose of keyed randomness, every seed and every unkeyed draw in the source, by parsing it.

The module of keyed randomness is the one that creates NumPy's Philox generators. Calls of its public functions with a
parameter `purpose` are followed through imports, aliases, and functions that pass a purpose on, wherever they are
defined. A purpose must be readable as text: a string, an f-string, or a constant of a module. Anything else raises
LookupError, and this file must be extended.
"""

from __future__ import annotations

import ast
import builtins
import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from golden_names import Names

PARAMETER = "purpose"
HOLE = "{}"
"""Stands in a purpose for what is only known when it is drawn."""
Function = ast.FunctionDef | ast.AsyncFunctionDef
SEEDS = {
    "manual_seed", "seed_all", "default_rng", "SeedSequence", "RandomState", "Philox", "PCG64", "MT19937", "Random",
}  # fmt: skip
"""Calls that seed a generator, by the last part of their name."""
SEEDED = {"random_state", "rng_seed", "generator"}
"""Keywords that hand a seed or a generator to a library."""
UNKEYED = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial",
    "normal_", "uniform_", "trunc_normal_", "fork_rng",
}  # fmt: skip
"""Draws from a library's own generator, whose order the order of the calls decides."""


@dataclass
class Module:
    """A file of the package, with what its names stand for."""

    path: Path
    dotted: str
    tree: ast.Module
    imports: dict[str, str] = field(default_factory=dict)
    """Name -> dotted name of what it is."""
    constants: dict[str, ast.expr] = field(default_factory=dict)
    """Names that the module assigns once, at its top level."""
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)


@dataclass(frozen=True)
class Forwarder:
    """A function that hands one of its parameters on as a purpose."""

    module: str
    name: str
    index: int
    """Of the parameter, without self."""
    parameter: str
    method: bool


class Source:
    """All files of a checkout: dvae/ with launchers/ and tools/, which are parts of it."""

    def __init__(self, root: Path, names: Names | None = None) -> None:
        self.names = Names({}) if names is None else names
        self.modules: dict[str, Module] = {}
        for folder, prefix in (("dvae", ""), ("launchers", "dvae."), ("tools", "dvae."), ("recipes", "dvae.")):
            for path in sorted((root / folder).rglob("*.py")):
                parts = list(path.relative_to(root).with_suffix("").parts)
                dotted = prefix + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
                self.modules.setdefault(dotted, read(Module(path, dotted, tree)))
        makers = [module for module in self.modules.values() if makes_philox(module)]
        if len(makers) != 1:
            raise LookupError(f"{len(makers)} modules make Philox generators, not one: {[m.dotted for m in makers]}")
        self.keyed = makers[0]
        self.functions = {
            node.name: parameters(node)
            for node in self.keyed.tree.body
            if isinstance(node, Function) and not node.name.startswith("_") and PARAMETER in parameters(node)
        }

    def purposes(self) -> dict[str, set[str]]:
        """Purpose, with holes -> golden names of the functions of keyed randomness that draw for it.

        Raises LookupError for a use that cannot be followed.
        """
        found: dict[str, set[str]] = defaultdict(set)
        waiting: dict[Forwarder, set[str]] = {}
        for module in self.modules.values():
            if module is not self.keyed:
                self._direct(module, found, waiting)
        done: dict[Forwarder, set[str]] = {}
        while waiting:  # a forwarder may be called by another one
            forwarder, by = waiting.popitem()
            if by <= done.get(forwarder, set()):
                continue
            done[forwarder] = done.get(forwarder, set()) | by
            for module in self.modules.values():
                for call, argument in self._calls(module, forwarder):
                    self._take(module, call, argument, by, found, waiting)
        return dict(found)

    def _direct(self, module: Module, found: dict[str, set[str]], waiting: dict[Forwarder, set[str]]) -> None:
        """Uses of the keyed functions themselves."""
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Name | ast.Attribute) or not isinstance(node.ctx, ast.Load):
                continue
            owner, _, name = (self.resolve(module, node) or "").rpartition(".")
            if owner != self.keyed.dotted or name not in self.functions:
                continue
            call = module.parents[node]
            if not isinstance(call, ast.Call) or call.func is not node:
                raise LookupError(
                    f"{module.path}:{node.lineno}: {name} is handed about, its purpose cannot be followed"
                )
            names = self.functions[name]
            argument = argument_of(call, names.index(PARAMETER), PARAMETER)
            if argument is None:
                raise LookupError(f"{module.path}:{node.lineno}: {name} is called without a purpose")
            self._take(module, call, argument, {self.names.golden("functions", name)}, found, waiting)

    def _take(
        self,
        module: Module,
        call: ast.Call,
        argument: ast.expr,
        by: set[str],
        found: dict[str, set[str]],
        waiting: dict[Forwarder, set[str]],
    ) -> None:
        """Enter the purpose of a call, or the function around it that hands its own parameter on."""
        if isinstance(argument, ast.Name):
            function = self._owner(module, call, argument.id)
            if function is not None:
                inside = module.parents.get(function)
                method = isinstance(inside, ast.ClassDef)
                names = [name for name in parameters(function) if not (method and name in ("self", "cls"))]
                forwarder = Forwarder(module.dotted, function.name, names.index(argument.id), argument.id, method)
                waiting[forwarder] = waiting.get(forwarder, set()) | by
                return
        for text in self.texts(module, argument):
            found[text] |= by

    def _owner(self, module: Module, node: ast.AST, name: str) -> Function | None:
        """The innermost function around a node that has a parameter of this name."""
        around: ast.AST | None = node
        while around is not None:
            if isinstance(around, Function) and name in parameters(around):
                return around
            around = module.parents.get(around)
        return None

    def _calls(self, module: Module, forwarder: Forwarder) -> Iterator[tuple[ast.Call, ast.expr]]:
        """Calls of a forwarder in a module, with what is given as the purpose.

        Any object may have a method of that name, so one counts only if it is given what can be text. (The golden run
        knows every purpose that is drawn for, also one that is hidden from here.)
        """
        for call in (node for node in ast.walk(module.tree) if isinstance(node, ast.Call)):
            argument = argument_of(call, forwarder.index, forwarder.parameter)
            if argument is None:
                continue
            if forwarder.method:
                named = isinstance(call.func, ast.Attribute) and call.func.attr == forwarder.name
                called = named and self._may_be_text(module, argument, forwarder.parameter)
            else:
                own = module.dotted == forwarder.module
                here = own and isinstance(call.func, ast.Name) and call.func.id == forwarder.name
                called = here or self.resolve(module, call.func) == f"{forwarder.module}.{forwarder.name}"
            if called:
                yield call, argument

    def _may_be_text(self, module: Module, node: ast.expr, parameter: str) -> bool:
        """Whether an expression is text, a constant that is, or a parameter of that name or of type str."""
        if isinstance(node, ast.Name) and (function := self._owner(module, node, node.id)):
            every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
            annotation = next(arg.annotation for arg in every if arg.arg == node.id)
            return node.id == parameter or (annotation is not None and ast.unparse(annotation) == "str")
        try:
            return bool(self.texts(module, node))
        except LookupError:
            return False

    def texts(self, module: Module, node: ast.expr) -> list[str]:
        """What an expression may be as text, with holes. Raises LookupError if it cannot be read."""
        if is_text(node):
            assert isinstance(node, ast.Constant)
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            whole = [""]
            for part in node.values:
                some = self._texts_or_hole(module, part.value) if isinstance(part, ast.FormattedValue) else None
                whole = [begin + end for begin in whole for end in some or self.texts(module, part)]
            return whole
        if isinstance(node, ast.IfExp):
            return self.texts(module, node.body) + self.texts(module, node.orelse)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [a + b for a in self.texts(module, node.left) for b in self.texts(module, node.right)]
        constant = self.constant(module, node)
        if constant is None:
            raise LookupError(f"{module.path}:{node.lineno}: cannot read the purpose {ast.unparse(node)}")
        return self.texts(*constant)

    def _texts_or_hole(self, module: Module, node: ast.expr) -> list[str]:
        """The text of a constant, or a hole for anything else."""
        constant = self.constant(module, node)
        try:
            return [HOLE] if constant is None else self.texts(*constant)
        except LookupError:
            return [HOLE]

    def constant(self, module: Module, node: ast.expr) -> tuple[Module, ast.expr] | None:
        """The module and value of a constant that a name stands for."""
        if isinstance(node, ast.Name) and node.id in module.constants:
            return module, module.constants[node.id]
        owner, _, name = (self.resolve(module, node) or "").rpartition(".")
        if owner in self.modules and name in self.modules[owner].constants:
            return self.modules[owner], self.modules[owner].constants[name]
        return None

    def resolve(self, module: Module, node: ast.AST) -> str | None:
        """The dotted name of what a name or attribute stands for, through imports from one file to the next."""
        if isinstance(node, ast.Attribute):
            inner = self.resolve(module, node.value)
            return None if inner is None else self._origin(f"{inner}.{node.attr}")
        if isinstance(node, ast.Name) and node.id in module.imports:
            return self._origin(module.imports[node.id])
        return None

    def _origin(self, dotted: str) -> str:
        """Where a name that a module has only imported comes from."""
        for _ in range(10):
            owner, _, name = dotted.rpartition(".")
            if dotted in self.modules or owner not in self.modules or name not in self.modules[owner].imports:
                break
            dotted = self.modules[owner].imports[name]
        return dotted

    # -- randomness that is not keyed ----------------------------------------------------------------------------------

    def seeds(self) -> dict[str, int]:
        """Calls that seed a generator or hand a seed to a library, and keys of hashes -> how often there is one.

        Names that only say where a value comes from are blanked out, so that they may be renamed. A parameter that is
        handed on under its own name is no seed.
        """
        found: dict[str, int] = defaultdict(int)
        for module, call in self._every_call():
            name = ast.unparse(call.func)
            last = name.rpartition(".")[2]
            if last in SEEDS or (last == "seed" and "random" in name):
                found[self._blanked(module, call)] += 1
            for keyword in call.keywords:
                handed_on = isinstance(keyword.value, ast.Name) and keyword.value.id == keyword.arg
                seeded = keyword.arg in SEEDED and not handed_on
                if seeded or (last.startswith("blake2") and keyword.arg in ("key", "person", "salt")):
                    found[f"{last}({keyword.arg}={self._blanked(module, keyword.value)})"] += 1
        return dict(found)

    def unkeyed(self) -> dict[str, int]:
        """Draws from torch's own generator, which depend on all draws before them -> in how many calls."""
        found: dict[str, int] = defaultdict(int)
        for module, call in self._every_call():
            resolved = self.resolve(module, call.func) or ast.unparse(call.func)
            last = resolved.rpartition(".")[2]
            if last in UNKEYED and (resolved.startswith("torch") or last.endswith("_")):
                found[resolved if resolved.startswith("torch") else f"tensor.{last}"] += 1
        return dict(found)

    def _every_call(self) -> Iterator[tuple[Module, ast.Call]]:
        for module in self.modules.values():
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Call):
                    yield module, node

    def _blanked(self, module: Module, node: ast.expr) -> str:
        """Text of an expression, with "_" for every name that is neither imported nor built in."""
        source = self

        class Blank(ast.NodeTransformer):
            def visit_Name(self, name: ast.Name) -> ast.expr:
                text = source.constant(module, name)
                if text is not None and is_text(text[1]):
                    return text[1]
                origin = source.resolve(module, name) or ""
                if origin == source.keyed.dotted or origin.startswith(f"{source.keyed.dotted}."):
                    function = source.names.golden("functions", origin.removeprefix(source.keyed.dotted))
                    return ast.Name(f"keyed{function}")
                return name if origin or hasattr(builtins, name.id) else ast.Name("_")

            def visit_Attribute(self, attribute: ast.Attribute) -> ast.expr:
                inner = self.visit(attribute.value)
                if isinstance(inner, ast.Name) and inner.id == "_":
                    return inner
                if isinstance(inner, ast.Name) and inner.id == "keyed":
                    return ast.Attribute(inner, source.names.golden("functions", attribute.attr))
                return ast.Attribute(inner, attribute.attr)

        return ast.unparse(Blank().visit(copy.deepcopy(node)))


def read(module: Module) -> Module:
    """Fill in a module's imports, constants, and what lies in what."""
    package = module.dotted if module.path.name == "__init__.py" else module.dotted.rpartition(".")[0]
    for node in ast.walk(module.tree):
        for child in ast.iter_child_nodes(node):
            module.parents[child] = node
        if isinstance(node, ast.Import):
            for alias in node.names:
                module.imports[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                module.imports[alias.asname or alias.name] = f"{base}.{alias.name}"
    for statement in module.tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            module.constants |= {t.id: statement.value for t in targets if isinstance(t, ast.Name)}
    return module


def makes_philox(module: Module) -> bool:
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Philox"
        for node in ast.walk(module.tree)
    )


def parameters(function: Function) -> list[str]:
    """Names of a function's parameters, in their order."""
    every = function.args
    return [arg.arg for arg in (*every.posonlyargs, *every.args, *every.kwonlyargs)]


def argument_of(call: ast.Call, index: int, name: str) -> ast.expr | None:
    """What a call gives for a parameter."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    starred = any(isinstance(arg, ast.Starred) for arg in call.args[: index + 1])
    return call.args[index] if index < len(call.args) and not starred else None


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
