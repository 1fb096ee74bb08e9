"""Scores by hand: a recognizer whose opinion is a known function of the latent."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dvae.evaluation.directions import direction_report
from dvae.evaluation.directions.attribute_recognizer import AttributeRecognizer
from dvae.evaluation.directions.direction_report import DirectionReport
from dvae.evaluation.directions.direction_scores import (
    EditEffect,
    HeldoutFaces,
    TargetValue,
    best_by_attribute,
    edit_effect,
    score_direction,
)
from dvae.inference.directions.attributes import LabeledAttributes
from dvae.inference.directions.direction import Direction, DirectionMethod
from dvae.inference.directions.direction_settings import DirectionsConfig

MIN_KAPPA = [True, True, True]


def recognize(z: torch.Tensor, numbers: list[int]) -> dict[str, torch.Tensor]:
    """Three attributes of two values: 0 is on where z_0 > 1, 1 where z_0 > 2.5 in every fourth face, 2 never;
    x_hat shows nothing."""
    number = torch.tensor(numbers)
    first = z[:, 0] > 1
    second = (z[:, 0] > 2.5) & (number % 4 == 0)
    codes = torch.stack([first, second, torch.zeros_like(first)], 1).long()
    return {"x_hat": torch.zeros_like(codes), "refined": codes}


def faces(n: int, first: int = 0) -> HeldoutFaces:
    numbers = list(range(first, first + n))
    z = torch.zeros(n, 2)
    return HeldoutFaces(z, torch.zeros(n, 3, dtype=torch.long), numbers, recognize(z, numbers))


def along(method: DirectionMethod = DirectionMethod.labels, sign: float = 1.0) -> Direction:
    return Direction("d", torch.tensor([sign, 0.0]), method, "")


def test_the_strength_is_the_one_that_turns_on_without_changing_the_rest() -> None:
    """1: nothing is on; 2: all is on and nothing else changes; 3: all on, a quarter of the rest changes."""
    found = score_direction(
        along(), [TargetValue(0, 1)], recognize, faces(20), faces(40, 20), [1.0, 2.0, 3.0], MIN_KAPPA
    )
    assert found.strength == 2.0
    assert found.final == EditEffect(40, 1.0, [1.0, 0.0, 0.0])
    assert found.stages["x_hat"] == EditEffect(40, 0.0, [0.0, 0.0, 0.0])
    assert found.meets_criterion(MIN_KAPPA)
    assert not found.meets_criterion([False, True, True])  # what the recognizer cannot tell does not count as turned on


def test_where_none_is_good_the_best_compromise_is_taken_and_fails() -> None:
    found = score_direction(along(), [TargetValue(0, 1)], recognize, faces(20), faces(40, 20), [3.0], MIN_KAPPA)
    assert found.final == EditEffect(40, 1.0, [1.0, 0.25, 0.0])
    assert found.final.largest_other_change(0, MIN_KAPPA) == (0.25, 1)
    assert not found.meets_criterion(MIN_KAPPA)
    assert found.meets_criterion([True, False, True])  # nor does its change
    assert found.final.largest_other_change(0, [True, False, False]) == (0.0, 0)


def test_a_direction_without_a_target_takes_the_best_and_either_way() -> None:
    targets = [TargetValue(i, value) for i in range(3) for value in range(2)]
    found = score_direction(
        along(DirectionMethod.pca, -1.0), targets, recognize, faces(20), faces(40, 20), [1.0, 2.0], MIN_KAPPA
    )
    assert (found.target, found.strength) == (TargetValue(0, 1), -2.0)
    labeled = score_direction(
        along(DirectionMethod.labels, -1.0),
        [TargetValue(0, 1)],
        recognize,
        faces(20),
        faces(40, 20),
        [1.0, 2.0],
        MIN_KAPPA,
    )
    assert labeled.final.on == 0.0  # one to a value goes one way


def test_only_faces_that_lack_the_value_count_and_only_against_strength_0() -> None:
    truth = torch.tensor([[0, 0], [0, 0], [1, 0], [0, 0], [0, 1]])
    before = torch.tensor([[0, 0], [1, 0], [0, 0], [0, 1], [0, 1]])  # 1 shows it unasked; 3 and 4 are read as 1
    after = torch.tensor([[1, 0], [1, 1], [1, 1], [1, 1], [0, 0]])
    found = edit_effect(truth, before, after, TargetValue(0, 1))
    assert found == EditEffect(3, pytest.approx(2 / 3), [pytest.approx(2 / 3), pytest.approx(1 / 3)])


def test_faces_that_all_show_the_value_give_no_figure() -> None:
    shown = HeldoutFaces(
        torch.zeros(4, 2), torch.ones(4, 3, dtype=torch.long), list(range(4)), recognize(torch.zeros(4, 2), [0] * 4)
    )
    found = score_direction(along(), [TargetValue(0, 1)], recognize, shown, shown, [1.0], MIN_KAPPA)
    assert found.final == EditEffect(0, 0.0, [0.0] * 3)
    assert not found.meets_criterion(MIN_KAPPA)


def test_the_report_names_every_attribute_and_what_failed(tmp_path: Path) -> None:
    attributes = LabeledAttributes(
        {"hat": ["no", "yes"], "hair": ["bun", "bob"], "eyes": ["a", "b"]}, {"head": "constant"}
    )
    recognizer = AttributeRecognizer(torch.nn.Identity(), attributes, [0.99, 0.95, 0.55], [0.5, 0.5, 0.5])
    assert recognizer.recognizable == [True, True, False]
    test = faces(40, 20)
    good = score_direction(along(), [TargetValue(0, 1)], recognize, faces(20), test, [2.0], recognizer.recognizable)
    bad = score_direction(along(), [TargetValue(1, 1)], recognize, faces(20), test, [3.0], recognizer.recognizable)
    assert best_by_attribute([bad, good], recognizer.recognizable) == [good, bad]
    made = DirectionReport(DirectionsConfig(run="r"), recognizer, [good, bad], test, 10, "abcdef")
    made.write(tmp_path / "d.md")
    text = (tmp_path / "d.md").read_text()
    squeezed = re.sub(" +", " ", text)
    assert "| d | hat=yes | 2 | 40 | 0% | 0% hair | 100% | 0% hair | yes |" in squeezed
    assert "| d | hair=bob | 3 | 40 | 0% | 0% hat | 25% | 100% hat | no |" in squeezed
    assert "eyes (not recognizable)" in text
    assert "1 of 2 recognizable attributes have a direction that meets it: hat (d)." in text
    figures = json.loads((tmp_path / "d.json").read_text())
    assert figures["attributes_that_meet_it"] == ["hat"]
    assert figures["directions"][1]["refined"] == {
        "faces": 40, "on": 0.25, "changed": {"hat": 1.0, "hair": 0.25, "eyes": 0.0},
    }  # fmt: skip
    assert figures["strength_0_as_labeled"]["refined"] == {"hat": 1.0, "hair": 1.0, "eyes": 1.0}

    drawn = []

    def draw(z: torch.Tensor, numbers: list[int]) -> dict[str, torch.Tensor]:
        drawn.append((z[:, 0].tolist(), numbers))
        return {stage: torch.zeros(len(z), 3, 4, 4, dtype=torch.uint8) for stage in ("x_hat", "refined")}

    direction_report.write_strips(made, draw, tmp_path / "d.png")
    assert drawn[0] == ([-2.0, -1.0, 0.0, 1.0, 2.0] * 3, [20] * 5 + [21] * 5 + [22] * 5)
    assert (tmp_path / "d.png").is_file()
