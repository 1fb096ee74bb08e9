"""A plug-in that is broken ends in one line, leaves nothing behind, and everything else works on."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hostile_plugins import GOOD, HEADER, HostilePlugin, hostile_plugins, plugin
from hydra.core.config_store import ConfigStore

from dvae.errors import UserError, run_command
from dvae.registry import discovery
from dvae.registry.core import KINDS
from dvae.registry.plugins import _leaves
from dvae.registry.schedules.base import SCHEDULES
from dvae.tools import components

PLUGINS = hostile_plugins()
every_plugin = pytest.mark.parametrize("hostile", [pytest.param(one, id=one.name) for one in PLUGINS])


def forked(work: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What `work` returns in a child process: a plug-in may change this interpreter for good."""
    out = folder / "answer.json"
    child = os.fork()
    if child == 0:
        try:
            out.write_text(json.dumps(work()))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return json.loads(out.read_text())


def said(*words: str) -> dict[str, Any]:
    """Status, stdout and stderr of tools/components.py."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run_command(components.command, list(words))
        except SystemExit as error:
            status = error.code
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def state() -> list[str]:
    """All components and configs, and the objects that they are."""
    classes = [f"{kind} {name} {id(cls)}" for kind, one in KINDS.items() for name, cls in one._classes.items()]
    return sorted(classes + [f"{path} {id(node)}" for path, node in _leaves(ConfigStore.instance().repo)])


@pytest.fixture(scope="module", autouse=True)
def listing() -> str:
    """What tools/components.py prints without any plug-in. All built-in components are imported then."""
    return said()["out"]


def written(folder: Path, hostile: HostilePlugin) -> None:
    (folder / f"{hostile.name}.py").write_text(hostile.source, encoding="utf-8")


def install(site: Path, package: str, *entries: str) -> None:
    """The metadata of an installed package with entry points of dvae."""
    about = site / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(["[dvae.plugins]", *entries]))


def rediscover() -> None:
    """Look for installed plug-ins as a new process does."""
    discovery._imported_installed = False
    discovery.discover()


@every_plugin
def test_named_on_the_command_line(hostile: HostilePlugin, tmp_path: Path, listing: str) -> None:
    written(tmp_path, hostile)

    def work() -> dict[str, Any]:
        sys.path.insert(0, str(tmp_path))
        before = state()
        named = said(f"plugins=[{hostile.name}]")
        return {"named": named, "same": state() == before, "after": said(), "module": hostile.name in sys.modules}

    found = forked(work, tmp_path)
    if hostile.message is None:
        assert found["named"]["status"] == 0
        assert f"[{hostile.name} (not installed as a package)]" in " ".join(found["named"]["out"].split())
        assert found["named"]["out"].isascii() or "\x1b" not in found["named"]["out"]
        assert "hello" not in found["named"]["out"]
        return
    assert found["named"]["status"] == 2
    assert found["named"]["out"] == ""
    (line,) = found["named"]["err"].splitlines()
    assert line.isprintable()
    assert len(line) < 700
    assert line.startswith(f"dvae: error: plugins: module '{hostile.name}' cannot be imported (")
    assert hostile.message in line
    assert found["same"]
    assert not found["module"]
    assert found["after"] == {"status": 0, "out": listing, "err": ""}


@every_plugin
def test_installed(hostile: HostilePlugin, tmp_path: Path, listing: str) -> None:
    written(tmp_path, hostile)
    install(tmp_path, "stranger", f"strange = {hostile.name}")

    def work() -> dict[str, Any]:
        sys.path.insert(0, str(tmp_path))
        rediscover()
        return said()

    found = forked(work, tmp_path)
    assert found["status"] == 0
    if hostile.message is None:
        listed = " ".join(found["out"].split())
        assert f"[{hostile.name} 1.0]" in listed or f"[{hostile.name} (not" in listed
        return
    *rest, line = found["out"].splitlines()
    assert line.startswith(f"plugins that failed to load: strange ({hostile.name}): ")
    assert hostile.message in line
    assert line.isprintable()
    assert rest == listing.splitlines()


def test_there_are_many_and_each_has_its_own_name() -> None:
    names = [hostile.name for hostile in PLUGINS]
    assert len(set(names)) == len(names) >= 20
    assert all(name.isidentifier() for name in names)


def test_what_a_plug_in_prints_goes_to_stderr(tmp_path: Path) -> None:
    written(tmp_path, next(one for one in PLUGINS if one.name == "prints"))

    def work() -> dict[str, Any]:
        sys.path.insert(0, str(tmp_path))
        return said("schedule", "plugins=[prints]")

    assert forked(work, tmp_path)["err"] == "hello\ncareful\n"


def test_a_mended_plug_in_of_several_files_is_imported_again(tmp_path: Path) -> None:
    package = tmp_path / "mended"
    package.mkdir()
    (package / "one.py").write_text(HEADER + GOOD)
    (package / "__init__.py").write_text("import mended.one\nraise RuntimeError('not yet')\n")

    def work() -> dict[str, Any]:
        sys.path.insert(0, str(tmp_path))
        before = state()
        with pytest.raises(UserError, match="not yet"):
            discovery.load_plugins(["mended"])
        clean = state() == before
        (package / "__init__.py").write_text("import mended.one  # that is all\n")
        discovery.load_plugins(["mended"])
        discovery.load_plugins(["mended"])
        return {"clean": clean, "module": SCHEDULES.get("hostile").__module__}

    assert forked(work, tmp_path) == {"clean": True, "module": "mended.one"}


def test_a_good_plug_in_stays_although_the_next_one_fails(tmp_path: Path) -> None:
    written(tmp_path, plugin("first", GOOD, None))
    written(tmp_path, plugin("second", "SCHEDULES._classes.clear()", "replaces"))

    def work() -> dict[str, Any]:
        sys.path.insert(0, str(tmp_path))
        return said("plugins=[first,second]") | {"then": said("schedule")["out"]}

    found = forked(work, tmp_path)
    assert found["status"] == 2
    assert "'second' cannot be imported (TypeError: it replaces or removes" in found["err"]
    assert "  hostile " in found["then"]


def test_configs_of_a_tool_that_the_plug_in_imported_stay(tmp_path: Path) -> None:
    written(tmp_path, plugin("curious", "import dvae.runs.replay\nraise RuntimeError", "RuntimeError"))

    def work() -> dict[str, Any]:
        sys.path.insert(0, str(tmp_path))
        sys.modules.pop("dvae.runs.replay", None)  # another test may have imported it
        ConfigStore.instance().repo.pop("replay_schema.yaml", None)
        before = "replay_schema" in dict(_leaves(ConfigStore.instance().repo))
        status = said("plugins=[curious]")["status"]
        return {"known": [before, "replay_schema" in dict(_leaves(ConfigStore.instance().repo))], "status": status}

    assert forked(work, tmp_path) == {"known": [False, True], "status": 2}


def test_ctrl_c_ends_the_command_and_leaves_no_half_plug_in(tmp_path: Path) -> None:
    written(tmp_path, plugin("interrupted", GOOD + "\nraise KeyboardInterrupt", None))

    def work() -> dict[str, Any]:
        sys.path.insert(0, str(tmp_path))
        before = state()
        return said("plugins=[interrupted]") | {"same": state() == before}

    found = forked(work, tmp_path)
    assert (found["status"], found["same"]) == (130, True)
    assert found["err"] == "dvae: interrupted: the same command again resumes\n"


def test_installed_plug_ins_of_the_same_name_are_named_each(tmp_path: Path) -> None:
    written(tmp_path, plugin("one", "sys.exit(1)", "SystemExit"))
    written(tmp_path, plugin("other", "sys.exit(2)", "SystemExit"))
    written(tmp_path, plugin("good", GOOD, None))
    install(tmp_path, "stranger", "same = one")
    install(tmp_path, "foreigner", "same = other", "same2 = not there!", "same3 = nowhere", "same4 = good:nothing")
    install(tmp_path, "friend", "same = good")

    def work() -> dict[str, Any]:
        sys.path.insert(0, str(tmp_path))
        rediscover()
        return said("schedule")

    found = forked(work, tmp_path)
    assert found["status"] == 0
    assert "  hostile " in found["out"]
    last = found["out"].splitlines()[-1]
    for text in (
        "same (one): SystemExit: 1",
        "same (other): SystemExit: 2",
        "same3 (nowhere): ModuleNotFoundError: No module named 'nowhere'",
        "same4 (good:nothing): AttributeError: module 'good' has no attribute 'nothing'",
    ):
        assert text in last
    assert "same2 (not there!): " in last


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "plugins=[nowhere]",
            "ModuleNotFoundError: No module named 'nowhere'); install it, or run this command in",
        ),
        ("plugins=[nowhere.at_all]", "No module named 'nowhere'); install it"),
        ("plugins=[json.nothing]", "No module named 'json.nothing'); install it"),
        ("plugins=[3]", "'3' is no module: give a list of modules, such as plugins=[my_plugin]"),
        ("plugins=[a b]", "'a b' is no module"),
        ("plugins=[.mine]", "'.mine' is no module"),
        ("plugins=[mine.]", "'mine.' is no module"),
        ("plugins=[./folder/mine.py]", "is a file: name its module, plugins=[mine], and run this from the file"),
        ("plugins=[mine.py]", "is a file: name its module, plugins=[mine]"),
        ("plugins=[folder/mine]", "is a file: name its module, plugins=[mine]"),
    ],
)
def test_what_is_no_module_is_told(word: str, message: str) -> None:
    found = said("schedule", word)
    assert found["status"] == 2
    (line,) = found["err"].splitlines()
    assert message in line


@pytest.mark.parametrize("word", ["plugins=[]", "plugins="])
def test_no_plug_in_is_none(word: str, listing: str) -> None:
    assert said(word) == {"status": 0, "out": listing, "err": ""}


@pytest.mark.parametrize("value", [3, {"a": 1}, [3], [None], [["json"]], [True]])
def test_a_config_with_odd_plugins_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"plugins.*give a list of modules"):
        discovery.load_plugins(value)


@pytest.mark.parametrize("node", ["linear", 3, ["linear"], {}, {"name": None}, {"name": 3}, {"name": ["linear"]}])
def test_a_config_that_names_no_component_is_refused(node: Any) -> None:
    with pytest.raises(UserError, match=r"schedule .*: give a mapping with a name"):
        SCHEDULES.config(node)
