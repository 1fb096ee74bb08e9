"""Every file of recipes/sweep is a sweep to W&B, and its command is one that tools/launch.py understands."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import sweeps
import wandb.wandb_agent
import yaml
from tests_support import ROOT

from dvae.config import compose
from dvae.config.recipe_files import recipe_names
from dvae.errors import UserError
from dvae.experiments.sweeps import sweep_spec

FILES = sorted((ROOT / "recipes" / "sweep").glob("*.yaml"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
GOOD = {
    "method": "random",
    "program": "tools/launch.py",
    "metric": {"name": "refiner/loss"},
    "parameters": {"train_refiner.lr": {"min": 1e-4, "max": 1e-2}},
    "command": ["${interpreter}", "${program}", "recipe=demo", "${args_no_hyphens}"],
}


def ends(parameter: dict[str, Any]) -> list[Any]:
    """The values of a choice, or the ends of a range."""
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def test_there_are_sweeps_and_the_command_lists_them() -> None:
    assert recipe_names("sweep") == [path.stem for path in FILES]
    assert {"demo", "avatars"} <= set(recipe_names("sweep"))


@every_file
def test_the_schema_of_wandb_has_nothing_against_it(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert sweeps.schema_violations_from_proposed_config(content) == []
    assert "${args_no_hyphens}" in content["command"]
    assert content["program"] == "tools/launch.py"
    assert (ROOT / content["program"]).is_file()


@every_file
def test_every_parameter_is_an_override_of_its_recipe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of a choice and both ends of a range, one of each parameter in a config, which then has them."""
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = {name: ends(given) for name, given in content["parameters"].items()}
    for number in range(max(map(len, values.values()))):
        chosen = {name: some[number % len(some)] for name, some in values.items()}
        words = sweep_spec.expand(content["command"], content["program"], chosen)
        settings = compose.to_run_config(
            compose.compose("train", words[words.index(sweep_spec.program(content["program"])) + 1 :])
        )
        assert settings.run.endswith("/abc123")
        for name, value in chosen.items():
            found = functools.reduce(getattr, name.split("."), settings)
            assert getattr(found, "value", found) == value


@every_file
def test_a_trial_here_has_the_words_of_the_file_but_for_the_servers(path: Path) -> None:
    loaded = sweep_spec.load(path.stem)
    parameters = {name: ends(given)[0] for name, given in loaded.sweep["parameters"].items()}
    words = loaded.overrides(parameters, ["train_refiner.steps=7", "run=out/trial-0001"])
    assert words[-1] == "run=out/trial-0001"
    assert "train_refiner.steps=7" in words
    assert {f"{name}={value}" for name, value in parameters.items()} < set(words)
    assert not any(word.startswith("tracking.") for word in words)
    fields = [sweep_spec.key(word) for word in words]
    assert len(fields) == len(set(fields))


@every_file
def test_the_command_expands_as_wandbs_own_agent_expands_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["command"].append("source.n=${envvar:COUNT_OF_IMAGES}")
    parameters = {name: ends(given)[0] for name, given in content["parameters"].items()}
    started: list[list[str]] = []

    class Recorded:
        def __init__(self, command: list[str], **more: Any) -> None:
            started.append(command)

    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("COUNT_OF_IMAGES", "321")
    monkeypatch.setattr(wandb.wandb_agent, "AgentProcess", Recorded)
    ours = sweep_spec.expand(content["command"], content["program"], parameters)
    agent = wandb.wandb_agent.Agent(api=None, queue=None, sweep_id="s")
    agent._sweep_command = content["command"]
    args = {name: {"value": value} for name, value in parameters.items()}
    agent._command_run({"run_id": "abc", "program": content["program"], "args": args})
    (theirs,) = started
    places = {"python": ours[1], content["program"]: sweep_spec.program(content["program"])}
    assert [places.get(chunk, chunk) for chunk in theirs] == ours
    assert ours[-1] == "source.n=321"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "grit"}, "W&B's schema refuses it: 'grit' is not one of"),
        ({"method": "custom"}, "method: custom: known: bayes, grid, random"),
        ({"metric": None}, "schema refuses it: None is not of type 'object'"),
        ({"parameters": {}}, "schema refuses it"),
        ({"parameters": {"seed": {"min": 3, "max": 2}}}, "seed: min 3 is not less than max 2"),
        ({"parameters": {"a": {"parameters": {"b": {"value": 1}}}}}, "'a' is nested: write its fields with dots"),
        ({"command": ["python", "${program}", "${args}"]}, "command: ${args}: did you mean"),
        ({"command": ["python", "${program}"]}, "it needs ${program} and ${args_no_hyphens}"),
        ({"command": []}, "it has no command: copy the one of avatars.yaml"),
        ({"program": ""}, "it has no program"),
        ({"early_terminate": {"type": "hyperband"}}, "schema refuses it"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(change: dict[str, Any], said: str) -> None:
    assert sweep_spec.check("mine", GOOD) == GOOD
    with pytest.raises(UserError) as error:
        sweep_spec.check("mine", GOOD | change)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_metric_must_be_named() -> None:
    with pytest.raises(UserError, match="names no metric to optimize"):
        sweep_spec.check("mine", {name: value for name, value in GOOD.items() if name != "metric"})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dmo", "unknown sweep 'dmo': did you mean 'demo'"),
        ("", "unknown sweep '': known: avatars, demo"),
        ("none.yaml", "sweep=none.yaml: no such file; the sweeps here are avatars, demo"),
    ],
)
def test_an_unknown_sweep_is_one_line(name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        sweep_spec.load(name)
    assert str(error.value).startswith(said)


def test_what_is_no_yaml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1,\n", encoding="utf-8")
    with pytest.raises(UserError, match="not a readable YAML file"):
        sweep_spec.load(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("metric", "overrides"),
    [
        ("encoder/loss", ["recipe=demo"]),
        ("joint/loss", ["stages=[shards,joint,prior]", "denoiser.data_scale=2"]),
        ("distil-8/loss", ["recipe=avatars_distil"]),
    ],
)
def test_every_training_has_metrics_by_step_for_hyperband(metric: str, overrides: list[str]) -> None:
    changed = {"metric": {"name": metric}, "early_terminate": {"type": "hyperband", "min_iter": 2}}
    spec = sweep_spec.SweepSpec("mine", sweep_spec.check("mine", GOOD | changed))
    settings = sweep_spec.check_first_trial(spec, overrides)
    assert metric.partition("/")[0].partition("-")[0] in settings.stages


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({}, ["train_refiner.lr=1"], "train_refiner.lr=1: the sweep chooses train_refiner.lr: leave it out"),
        ({}, ["cuont=6"], "unknown field 'cuont'"),
        ({}, ["stages=[shards,encoder]"], "metric 'refiner/loss' is not measured by the stages shards, encoder"),
        ({"parameters": {"refiner.widht": {"value": 3}}}, [], "unknown field 'refiner.widht': did you mean 'width'"),
        ({"method": "grid"}, [], "method: grid: Parameter train_refiner.lr is a disallowed type with grid search"),
        (
            {"metric": {"name": "evaluate/nfe"}, "early_terminate": {"type": "hyperband", "min_iter": 2}},
            [],
            "early_terminate: 'evaluate/nfe' is known at a trial's end only",
        ),
    ],
)
def test_what_the_recipe_refuses_is_said_before_anything_is_written(
    change: dict[str, Any], words: list[str], said: str
) -> None:
    sweep_spec.check_first_trial(sweep_spec.SweepSpec("mine", GOOD), [])
    with pytest.raises(UserError) as error:
        sweep_spec.check_first_trial(sweep_spec.SweepSpec("mine", sweep_spec.check("mine", GOOD | change)), words)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
