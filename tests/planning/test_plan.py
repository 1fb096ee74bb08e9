"""The planner's arithmetic, its refusals, and that it takes every kind of recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests_support import Tool

from dvae.config.recipe_files import recipe_names
from dvae.config.schema import Precision
from dvae.errors import UserError
from dvae.experiments.bench import planner_bench
from dvae.models import components
from dvae.planning import plan, plan_report
from dvae.planning import plan_run as planner
from dvae.planning.counting import Operations
from dvae.planning.hardware import GPUS
from dvae.planning.plan import Activations, PlannedModule
from dvae.planning.plan_settings import PlanConfig
from dvae.training.engine.memory_estimate import bytes_per_rank, bytes_sent

H100 = GPUS["h100"]
SMALL = [
    "image_size=16", "encoder.resolutions=[8,4,1]", "encoder.channels=[16,16,32]", "encoder.encoder_blocks=[1,1,1]",
    "encoder.decoder_blocks=[1,1,1]", "refiner.width=32", "refiner.multipliers=[1]", "refiner.blocks=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> plan.ResourcePlan:
    settings = PlanConfig(nodes=2, gpus_per_node=2)
    return plan.make_plan(planner.compose_recipe(["recipe=demo", *SMALL]), settings)


def test_time_is_operations_over_a_share_of_the_peak() -> None:
    work = Operations(convolutions=10**15, products=10**14)
    assert plan.seconds(work, H100, Precision.bf16, 0.25) == pytest.approx(1100 / 989.4 / 0.25)
    assert plan.seconds(work, H100, Precision.fp32, 0.5) == pytest.approx((1000 / 494.7 + 100 / 66.9) / 0.5)


@pytest.mark.parametrize(("zero", "shares"), [(0, 2), (1, 3), (2, 3), (3, 2)])
def test_bytes_sent_in_a_step(zero: int, shares: float) -> None:
    """All of it but a rank's own part, so many times: a ring's all-reduce goes around twice."""
    assert bytes_sent(10**6, 8, zero, 1) == pytest.approx(shares * 4e6 * 7 / 8)
    assert bytes_sent(10**6, 1, zero, 1) == 0


def test_stage_3_gathers_twice_what_it_cannot_keep() -> None:
    assert bytes_sent(2 * 10**9, 8, 3, 2) == pytest.approx(2 * 3 * 8e9 * 7 / 8)


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    assert plan.bandwidth(PlanConfig(nodes=1), H100) == 450e9
    assert plan.bandwidth(PlanConfig(nodes=2), H100) == 50e9
    assert plan.bandwidth(PlanConfig(nodes=2, network=12.5), H100) == 12.5e9


def test_states_are_the_formula_that_two_ranks_keep(demo: plan.ResourcePlan) -> None:
    for stage in demo.stages:
        for sharding in stage.shardings:
            training = replace(stage.training, zero_stage=sharding.zero)
            known = bytes_per_rank(stage.modules[0].parameters, 4, training)
            assert (sharding.states.between_steps, sharding.states.with_gradients) == known


def test_the_demo_adds_up(demo: plan.ResourcePlan) -> None:
    assert [stage.name for stage in demo.stages] == ["encoder", "refiner"]
    counted = components.build_models_on_meta(planner.compose_recipe(["recipe=demo", *SMALL])).parameters()
    for stage in demo.stages:
        assert stage.modules[0].parameters == counted[stage.name]
        assert stage.micro_batch * demo.ranks == stage.training.batch
        chosen = stage.chosen
        assert chosen.step == pytest.approx(stage.computing + chosen.communication + stage.optimizer)
        assert stage.gpu_days == pytest.approx(4 * stage.training.steps * chosen.step / 86400)
        assert stage.images_per_second == pytest.approx(stage.training.batch / chosen.step)
        assert stage.shardings[3].step < stage.shardings[2].step  # its communication is hidden
    assert demo.stages[0].modules[0].activations[0].frozen == Operations()
    assert demo.stages[1].modules[0].activations[0].frozen.total > 0
    plain, again = demo.stages[1].modules[0].activations
    assert again.recomputed
    assert again.kept < plain.kept
    assert again.trained.total > plain.trained.total


def test_the_largest_micro_batch_just_fits() -> None:
    none = Operations()
    counts = Activations(recomputed=False, kept=80, passing=20, fixed=50, frozen=none, trained=none)
    module = PlannedModule(name="refiner", parameters=1, averages=1, activations=[counts])
    largest = plan._largest(1000.0, [module], lambda one: one.activations[0])
    assert largest == 9
    assert counts.bytes(largest) <= 1000 < counts.bytes(largest + 1)
    assert plan._largest(-1.0, [module], lambda one: one.activations[0]) == 0


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPUS, "h100", replace(H100, memory=0.0001))
    found = plan.make_plan(planner.compose_recipe(["recipe=demo", *SMALL]), PlanConfig(gpus_per_node=1))
    for stage in found.stages:
        assert not stage.chosen.fits
        assert stage.chosen.largest == 0
    assert " no " in plan_report.format_plan(found)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gpu=h10", "unknown gpu 'h10': did you mean 'h100'?"),
        ("gpus_per_node=3", "batch 32 does not divide into 3 ranks x 1 micro-batches: use 30 or 33"),
        ("nodes=0", "nodes=0: use 1 or more"),
        ("efficiency=1.5", "efficiency=1.5: a share of the peak"),
        ("reserve=1", "reserve=1: a share of the memory"),
        ("network=0", "network=0: use a number above 0"),
        ("nodes=two", "nodes: "),
        ("refiner.widht=3", "unknown field 'refiner.widht': did you mean 'width'?"),
    ],
)
def test_mistakes_are_one_line(word: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        planner.run(["recipe=demo", word])
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_composes_for_the_planner(name: str) -> None:
    """No path to images is asked for."""
    assert planner.compose_recipe([f"recipe={name}"]).recipe == name


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=toy2d"],
        ["recipe=mnist", "refiner.multipliers=[1]"],
        pytest.param(
            ["recipe=ldm_avatars", "encoder.channels=[8,8]", "encoder.groups=4", "refiner.multipliers=[1]"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["recipe=faces_guided", *SMALL, "classifier.multipliers=[1]"], marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_recipe_is_planned(words: list[str]) -> None:
    """Points; no encoder; a discriminator and cached latents; a classifier."""
    composed = planner.compose_recipe(words)
    found = plan.make_plan(composed, PlanConfig(gpus_per_node=1))
    assert [stage.name for stage in found.stages] == [
        name for name in ("encoder", "refiner", "classifier") if name in composed.stages
    ]
    said = plan_report.format_plan(found)
    assert "predicted" in said
    for stage in found.stages:
        assert stage.operations.total > 0
        assert stage.gpu_days > 0
        assert all(one.bytes(1) > 0 for module in stage.modules for one in module.activations)
        reads = composed.recipe != "toy2d" and not (composed.recipe == "ldm_avatars" and stage.name == "refiner")
        assert (stage.images_per_second > 0) == reads
    two = {module.name for stage in found.stages for module in stage.modules} - {stage.name for stage in found.stages}
    assert two == ({"discriminator"} if composed.recipe == "ldm_avatars" else set())


def test_the_command_prints_and_writes(tool: Tool, tmp_path: Path) -> None:
    done = tool("plan", "recipe=demo", *SMALL, "stages=[encoder]", "gpus_per_node=2", "out=plan.json")
    assert done.returncode == 0, done.stderr
    assert "all of it is predicted" in done.stdout
    assert "efficiency=0.1" in done.stdout
    figures: Any = json.loads((tmp_path / "plan.json").read_text())
    assert figures["predicted"] is True
    assert figures["stages"][0]["training"]["precision"] == "bf16"
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_an_encoder_that_is_taken_over_is_not_planned() -> None:
    words = ["recipe=demo", *SMALL, "encoder_weights=elsewhere", "stages=[encoder]"]
    found = plan.make_plan(planner.compose_recipe(words), PlanConfig())
    assert found.given
    assert not found.stages
    assert "taken from elsewhere" in plan_report.format_plan(found)


def test_the_trial_predicts_with_the_first_ones_efficiency() -> None:
    work = {"a": Operations(100, 100), "b": Operations(200, 300), "c": Operations(0, 100)}
    found = planner_bench.rows(["a", "b", "c"], work, {"a": 6.0, "b": 8.0, "c": 1.0}, (100.0, 50.0))
    assert [row.predicted for row in found] == pytest.approx([6.0, 14.0, 2.0])  # 3, 7 and 1 s at the peak; a takes 6
    assert [row.error for row in found] == pytest.approx([0.0, 0.75, 1.0])


def test_the_trial_needs_two_widths() -> None:
    with pytest.raises(UserError, match=r"use two or more"):
        planner_bench.run(planner_bench.PlannerBenchConfig(widths=[32]))
