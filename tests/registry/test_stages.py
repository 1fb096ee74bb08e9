"""Stages as components: their order, the fields that they add to a run's settings, what is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import pytest
from tests_support import ROOT
from torch import nn

from dvae.config import compose
from dvae.config.schema import RunConfig, TrainingConfig
from dvae.errors import UserError
from dvae.registry.stages.base import (
    STAGES,
    DeclaredStage,
    StageConfig,
    exported_parts,
    run_config_class,
    settings_of,
    stage_fields,
    training_fields,
    with_settings,
)
from dvae.stages.base import Stage, TrainStage, open_stage, open_train_stage
from dvae.stages.joint import JointConfig, JointStage
from dvae.stages.train_stage import check_task

ORDER = ["shards", "encoder", "joint", "prior", "cache", "refiner", "classifier", "distil", "evaluate"]


@dataclass(kw_only=True, slots=True)
class Own:
    strength: float = 1.0


@dataclass(kw_only=True, slots=True)
class Sharpen(StageConfig):
    sharpen: Own = field(default_factory=Own)
    train_sharpen: TrainingConfig = field(default_factory=TrainingConfig)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that a test registers are forgotten after it."""
    STAGES.names()
    monkeypatch.setattr(STAGES, "_classes", dict(STAGES._classes))


def stage(config: Any = Sharpen, **attributes: Any) -> type[Stage]:
    methods = {"run": lambda self, run: None, "Config": config, "__module__": "mine"}
    return type("Sharpens", (Stage,), methods | attributes)


def test_the_order_and_what_trains() -> None:
    assert STAGES.order() == ORDER
    assert STAGES.order(["evaluate", "shards", "refiner"]) == ["shards", "refiner", "evaluate"]
    assert STAGES.trained() == ["encoder", "joint", "refiner", "classifier", "distil"]
    assert training_fields() == tuple(f"train_{name}" for name in STAGES.trained())
    assert exported_parts() == {"encoder": "encoder", "refiner": "denoiser", "classifier": "classifier"}


@pytest.mark.parametrize(
    ("after", "before", "place"),
    [(("refiner",), ("classifier",), 6), (("shards",), ("encoder",), 1), ((), ("shards",), 0), (("evaluate",), (), 9),
     (("a stage of nobody",), ("shards", "nor this"), 0)],
)  # fmt: skip
def test_a_stage_says_its_place(registered: None, after: tuple[str, ...], before: tuple[str, ...], place: int) -> None:
    STAGES.register("sharpen")(stage(after=after, before=before))
    assert STAGES.order().index("sharpen") == place
    assert [name for name in STAGES.order() if name != "sharpen"] == ORDER


def test_a_circle_is_refused(registered: None) -> None:
    with pytest.raises(UserError, match=r"stages .*refiner.*sharpen.*: each is declared to run before another"):
        STAGES.register("sharpen")(stage(after=("evaluate",), before=("refiner",)))
    assert STAGES.order() == ORDER


def test_its_fields_are_those_of_a_run(registered: None) -> None:
    own = {"sharpen", "train_sharpen"}
    assert own.isdisjoint(one.name for one in fields(run_config_class()))
    STAGES.register("sharpen")(stage())
    assert own < {one.name for one in fields(run_config_class())}
    words = ["recipe=demo", "sharpen.strength=3", "train_sharpen.steps=7"]
    config = compose.to_run_config(compose.compose("train", words))
    assert isinstance(config, RunConfig)
    assert config.training("sharpen").steps == 7
    assert settings_of(config, Sharpen).sharpen == Own(strength=3.0)
    changed = with_settings(config, Sharpen(sharpen=Own(strength=5.0)))
    assert settings_of(changed, Sharpen).sharpen.strength == 5.0
    assert settings_of(config, Sharpen).sharpen.strength == 3.0


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sharpen.strenth=3", "unknown field 'sharpen.strenth': did you mean 'strength'?"),
        ("sharpen.strength=much", "sharpen.strength"),
        ("train_sharpen.stesp=3", "unknown field 'train_sharpen.stesp': did you mean 'steps'?"),
        ("train_sharpen.steps=0", "train_sharpen.steps=0: use 1 or more"),
        ("train_sharpn.steps=3", "unknown field 'train_sharpn.steps': did you mean 'train_sharpen'?"),
        ("stages=[sharpn]", "unknown stage 'sharpn': did you mean 'sharpen'?"),
    ],
)
def test_wrong_settings_of_it_are_one_line(registered: None, word: str, said: str) -> None:
    STAGES.register("sharpen")(stage())
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        compose.to_run_config(compose.compose("train", ["recipe=demo", word]))
    assert "\n" not in str(raised.value)


@dataclass(kw_only=True, slots=True)
class TakesAField(StageConfig):
    denoiser: Own = field(default_factory=Own)


@dataclass(kw_only=True, slots=True)
class HidesAMethod(StageConfig):
    training: Own = field(default_factory=Own)


@dataclass(kw_only=True, slots=True)
class NamedAsHydraReads(StageConfig):
    defaults: Own = field(default_factory=Own)


@dataclass(kw_only=True, slots=True)
class TakesAnothers(StageConfig):
    train_joint: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(kw_only=True, slots=True)
class TrainsByAnotherName(StageConfig):
    train_this: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(kw_only=True, slots=True)
class TrainsByAnotherType(StageConfig):
    train_sharpen: Own = field(default_factory=Own)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (TakesAField, "Config.denoiser is a field of every run"),
        (HidesAMethod, "Config.training: this name is reserved"),
        (NamedAsHydraReads, "Config.defaults: this name is reserved"),
        (TakesAnothers, "Config.train_joint is a field of the stage 'joint'"),
        (TrainsByAnotherName, "Config.train_this: write train_sharpen: TrainingConfig"),
        (TrainsByAnotherType, "Config.train_sharpen: write train_sharpen: TrainingConfig"),
        (Own, "needs a nested @dataclass"),
    ],
)
def test_fields_that_are_taken_are_refused(registered: None, config: type, said: str) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        STAGES.register("sharpen")(stage(config))
    assert "sharpen" not in STAGES.names()


def test_what_only_declares_itself_cannot_be_run(registered: None, tiny: list[str]) -> None:
    methods = {"run": lambda self, run: None, "Config": Sharpen, "__module__": "mine"}
    STAGES.register("sharpen")(type("Sharpens", (DeclaredStage,), methods))
    config = compose.to_run_config(compose.compose("train", tiny))
    with pytest.raises(UserError, match=r"stage 'sharpen' of mine must derive from dvae\.stages\.base\.Stage"):
        open_stage("sharpen", config)
    with pytest.raises(TypeError, match="must implement run"):
        STAGES.register("no_run")(type("NoRun", (DeclaredStage,), {"Config": Sharpen}))


def test_a_stage_that_does_not_train_has_no_task(tiny: list[str]) -> None:
    config = compose.to_run_config(compose.compose("train", tiny))
    with pytest.raises(UserError, match="the stage prior does not train: name one of encoder, joint, refiner"):
        open_train_stage("prior", config)
    with pytest.raises(NotImplementedError):
        open_stage("prior", config).run_part(None, 0, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STAGES.names())
def test_every_stage(name: str, tiny: list[str]) -> None:
    """It is a Stage in the file of its name; what it says of itself fits together."""
    cls = STAGES.get(name)
    assert issubclass(cls, Stage)
    assert cls.__module__ == f"dvae.stages.{name}"
    assert cls.all_ranks == (f"train_{name}" in stage_fields(cls))
    assert not (cls.in_parts and not cls.own_job)
    assert {*cls.after, *cls.before} <= set(STAGES.names())
    parts = getattr(cls, "parts", {})
    assert set(parts) <= set(cls.makes)
    config = compose.to_run_config(compose.compose("train", tiny))
    assert settings_of(config, cls.Config) == cls.Config(**{one: getattr(config, one) for one in stage_fields(cls)})


def test_the_settings_of_joint_are_its_own() -> None:
    words = ["recipe=demo", "joint.weight=2", "joint.gradient_to=z"]
    config = compose.to_run_config(compose.compose("train", words))
    own = settings_of(config, JointStage.Config).joint
    assert isinstance(own, JointConfig)
    assert (own.weight, own.gradient_to.name) == (2.0, "z")


@pytest.mark.parametrize("name", ["joint", "distil"])
def test_the_name_of_an_optional_stage_stands_in_its_file_alone(name: str) -> None:
    files = [path for folder in ("dvae", "tools", "launchers") for path in (ROOT / folder).rglob("*.py")]
    holding = [path.name for path in files if re.search(f"[\"']{name}[\"']", path.read_text(encoding="utf-8"))]
    assert holding == [f"{name}.py"]


@pytest.mark.parametrize("attribute", ["after", "before", "makes", "mutable"])
@pytest.mark.parametrize("value", ["encoder", ["encoder"], (3,), None])
def test_what_a_stage_declares_is_a_tuple_of_names(registered: None, attribute: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"{attribute} is .*: write a tuple"):
        STAGES.register("sharpen")(stage(**{attribute: value}))


def test_a_decorator_without_a_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"register takes a name: write \.register\('my_stage'\)"):
        STAGES.register(JointStage)  # type: ignore[arg-type]


def train_stage_of(parts: object, makes: tuple[str, ...] = ()) -> type[TrainStage]:
    methods = {"open_task": lambda self, run, name: None, "Config": Sharpen, "__module__": "mine"}
    return type("Sharpens", (TrainStage,), methods | {"parts": parts, "makes": makes})


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"encoder": ""}, "parts would overwrite the weights of 'encoder'"),
        ({"posteriors": ""}, "parts would overwrite the weights of 'posteriors'"),
        ({"a/b": ""}, "write a mapping, such as {'sharpen': ''}"),
        (("sharpen",), "write a mapping"),
        (None, "write a mapping"),
    ],
)
def test_parts_that_would_damage_a_run_are_refused(registered: None, tiny: list[str], parts: object, said: str) -> None:
    STAGES.register("sharpen")(train_stage_of(parts))
    with pytest.raises(UserError, match=re.escape(said)):
        open_train_stage("sharpen", compose.to_run_config(compose.compose("train", tiny)))


def test_parts_of_the_models_are_saved_by_a_stage_that_makes_them(registered: None, tiny: list[str]) -> None:
    STAGES.register("sharpen")(train_stage_of({"encoder": ""}, ("encoder",)))
    assert open_train_stage("sharpen", compose.to_run_config(compose.compose("train", tiny))).name == "sharpen"


@pytest.mark.parametrize(
    ("name", "parts", "said"),
    [
        ("sharpen", {"sharpen": "weights"}, "the module 'sharpen' has no submodule 'weights' to save"),
        ("other", {"sharpen": ""}, "name='other' is no key of modules(), which has ['sharpen']"),
        (None, {"sharpen": ""}, "name=None is no key"),
    ],
)
def test_tasks_that_do_not_fit_are_refused_before_training(name: object, parts: dict[str, str], said: str) -> None:
    task: Any = SimpleNamespace(name=name, modules=lambda: {"sharpen": nn.Linear(2, 2)})
    with pytest.raises(UserError, match=re.escape(said)):
        check_task(task, parts)
