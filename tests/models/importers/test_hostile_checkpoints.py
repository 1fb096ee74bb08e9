"""Every hostile checkpoint ends in one line, soon, and without taking memory."""

from __future__ import annotations

import functools
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile_checkpoints import STRINGS, WORDS, blocks, ddpm, hostile_checkpoints, psld, saved
from omegaconf import DictConfig
from tests_support import environment

from dvae.errors import MachineError, UserError
from dvae.models.importers import convert_checkpoint

MOST_SECONDS = 5
"""Time of a processor that a file may take."""
MOST_BYTES = 500 * 2**20
"""Memory that a file may take beyond what the program has."""
LONGEST = 1000
"""Characters of a message."""


@functools.cache
def composed(layout: str) -> DictConfig:
    return convert_checkpoint.compose([*WORDS[layout], "ckpt=a", "out=b"])


def outcome(name: str, folder: Path) -> str:
    """How the conversion of `folder`/ckpt ends: "" if in one line of a user's error, else what is wrong with it."""
    config = composed(name.partition(":")[0]).copy()
    config.ckpt, config.out = str(folder / "ckpt"), str(folder / "out")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, limits[1]))
    start = time.process_time()
    try:
        convert_checkpoint.convert(config)
        return "it was converted"
    except (UserError, MachineError) as error:
        message = str(error)
    except BaseException as error:  # noqa: BLE001 whatever it is, it is the answer
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    took = time.process_time() - start
    if took > MOST_SECONDS:
        return f"it took {took:.1f} s"
    if not message.isprintable() or len(message) > LONGEST:
        return f"a message of {len(message)} characters: {message[:200]!r}"
    return "something was written" if (folder / "out").exists() else ""


def main(folder: Path) -> None:
    """Convert them all and print how that ended, a line of JSON each."""
    for number, (name, write) in enumerate(hostile_checkpoints()):
        place = folder / str(number)
        place.mkdir()
        write(place / "ckpt")
        signal.alarm(60)  # ends this process, if it waits for a pipe
        print(json.dumps([name, outcome(name, place)]), flush=True)
        signal.alarm(0)
        if (place / "ckpt").is_file():
            (place / "ckpt").unlink()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name of each hostile checkpoint, and what is wrong with how it ended, from a process of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    code = f"import sys; sys.path[:0] = {paths}; import test_hostile_checkpoints as t; t.main(t.Path({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=600)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert done.returncode == 0, (list(found)[-1:], done.stderr[-2000:])
    return found


def test_all_end_in_one_line(outcomes: dict[str, str]) -> None:
    assert {name: wrong for name, wrong in outcomes.items() if wrong} == {}


def test_none_is_left_out(outcomes: dict[str, str]) -> None:
    names = [name for name, _ in hostile_checkpoints()]
    assert len(names) > 200
    assert list(outcomes) == names


@pytest.mark.parametrize("state", [ddpm, psld])
def test_what_they_are_made_of_can_be_converted(state, tmp_path) -> None:
    """So each is refused for what is wrong with it."""
    name = {ddpm: "diffusevae", psld: "psld"}[state]
    saved(state())(tmp_path / "ckpt")
    assert outcome(f"{name}: whole", tmp_path) == "it was converted"


def test_true_block_strings_can_be_converted(tmp_path) -> None:
    blocks(STRINGS["enc_block_str"])(tmp_path / "ckpt")
    assert outcome("diffusevae: true strings", tmp_path) == "it was converted"


@pytest.mark.parametrize("given", [None, 5, "text", [], [1], 1.5, {"enc_block_str": 5}, {"a": {"b": []}}])
def test_hyper_parameters_of_a_wrong_type_do_not_matter(given, tmp_path) -> None:
    saved(ddpm(), hyper_parameters=given)(tmp_path / "ckpt")
    assert outcome("diffusevae: hyper-parameters", tmp_path) == "it was converted"
