"""What a direction changes and what it leaves alone, as an attribute recognizer sees it.

The strength is chosen on some held-out faces and the figures are taken on others. Each edited face is compared with
itself at strength 0 under the same noise, so that what encoding and refining change by themselves is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dvae.inference.directions.direction import Direction, DirectionMethod

MIN_TURNED_ON = 0.8
"""Share of the faces that lack a value which must show it, for a direction to count."""
MAX_CHANGED = 0.2
"""Share of faces below which every other attribute must change."""

RecognizeLatents = Callable[[torch.Tensor, list[int]], dict[str, torch.Tensor]]
"""Latents (n, *latent) and the numbers of their noise -> the recognized value of each attribute (n, A) of their x_hat
and, where there is a refiner, after it: {"x_hat": ..., "refined": ...}."""


@dataclass(frozen=True)
class HeldoutFaces:
    """Held-out faces to edit, and how they recognize at strength 0."""

    z: torch.Tensor
    """(n, *latent): posterior means."""
    truth: torch.Tensor
    """(n, A) int64: what their labels say."""
    numbers: list[int]
    """The number of each one's noise."""
    before: dict[str, torch.Tensor]
    """Recognized at strength 0, at each stage (n, A)."""

    def __getitem__(self, chosen: torch.Tensor) -> HeldoutFaces:
        """Those where chosen (n,) is true."""
        numbers = [number for number, wanted in zip(self.numbers, chosen.tolist(), strict=True) if wanted]
        before = {stage: codes[chosen] for stage, codes in self.before.items()}
        return HeldoutFaces(self.z[chosen], self.truth[chosen], numbers, before)


@dataclass(frozen=True)
class EditEffect:
    """What happened to the faces that lack a value, by their label and as recognized at strength 0."""

    faces: int
    on: float
    """Share of them that show it afterwards; 0 where there are none."""
    changed: list[float]
    """Share of them of which the recognized value of each attribute changed."""

    def largest_other_change(self, attribute: int, recognizable: Sequence[bool]) -> tuple[float, int]:
        """The largest change of a recognizable attribute other than `attribute`, and which that is; 0 of `attribute` if
        there is no other."""
        others = [(share, i) for i, share in enumerate(self.changed) if i != attribute and recognizable[i]]
        return max(others, default=(0.0, attribute))


@dataclass(frozen=True)
class TargetValue:
    """A value of an attribute, by their numbers."""

    attribute: int
    value: int


@dataclass(frozen=True)
class DirectionScore:
    """A direction's figures at the strength that was chosen for it."""

    direction: Direction
    target: TargetValue
    strength: float
    chosen_by: EditEffect
    """On the validation faces, at the last stage."""
    stages: dict[str, EditEffect]
    """On the test faces: of x_hat and, where there is a refiner, after it."""

    @property
    def final(self) -> EditEffect:
        """At the last stage: what a user sees."""
        return list(self.stages.values())[-1]

    def meets_criterion(self, recognizable: Sequence[bool]) -> bool:
        """Whether it turns its value on often enough, and changes little else."""
        return meets_criterion(self.final, self.target, recognizable)


def meets_criterion(effect: EditEffect, target: TargetValue, recognizable: Sequence[bool]) -> bool:
    """Whether the value of a recognizable attribute is turned on in MIN_TURNED_ON of the faces, and every other
    recognizable attribute changes in less than MAX_CHANGED of them."""
    worst, _ = effect.largest_other_change(target.attribute, recognizable)
    return recognizable[target.attribute] and effect.on >= MIN_TURNED_ON and worst < MAX_CHANGED


def edit_effect(truth: torch.Tensor, before: torch.Tensor, after: torch.Tensor, target: TargetValue) -> EditEffect:
    """Of codes (n, A): by label, as recognized at strength 0, and as recognized after the edit."""
    column = target.attribute
    lacking = (truth[:, column] != target.value) & (before[:, column] != target.value)
    count = int(lacking.sum())
    if count == 0:
        return EditEffect(0, 0.0, [0.0] * truth.shape[1])
    on = (after[lacking, column] == target.value).double().mean()
    return EditEffect(count, float(on), (after != before)[lacking].double().mean(0).tolist())


def score_direction(
    direction: Direction,
    targets: Sequence[TargetValue],
    recognize: RecognizeLatents,
    validation: HeldoutFaces,
    test: HeldoutFaces,
    strengths: Sequence[float],
    recognizable: Sequence[bool],
) -> DirectionScore:
    """A direction's score at the strength, and for the target, that is best on the validation faces.

    Best is the largest share turned on among those that change every other attribute in less than MAX_CHANGED of the
    faces; where none does, the largest share turned on less the largest change.
    """
    options = []
    for strength in candidate_strengths(direction, strengths):
        for target, effects in _effects(direction, strength, targets, recognize, validation):
            options.append((target, strength, list(effects.values())[-1]))

    def rank(option: tuple[TargetValue, float, EditEffect]) -> tuple[bool, float, float]:
        target, strength, effect = option
        worst, _ = effect.largest_other_change(target.attribute, recognizable)
        selective = worst < MAX_CHANGED
        return selective, effect.on if selective else effect.on - worst, -abs(strength)

    target, strength, chosen_by = max(options, key=rank)
    ((_, stages),) = _effects(direction, strength, [target], recognize, test)
    return DirectionScore(direction, target, strength, chosen_by, stages)


def _effects(
    direction: Direction,
    strength: float,
    targets: Sequence[TargetValue],
    recognize: RecognizeLatents,
    faces: HeldoutFaces,
) -> Iterator[tuple[TargetValue, dict[str, EditEffect]]]:
    """The effect on faces for each target, at each stage."""
    wanted = torch.zeros(len(faces.z), dtype=torch.bool)
    for target in targets:  # a face that shows all of them by its label is in no figure: it is not drawn
        wanted |= faces.truth[:, target.attribute] != target.value
    chosen = faces[wanted]
    after = recognize(direction.move(chosen.z, strength), chosen.numbers) if len(chosen.z) else chosen.before
    for target in targets:
        yield (
            target,
            {stage: edit_effect(chosen.truth, chosen.before[stage], codes, target) for stage, codes in after.items()},
        )


def candidate_strengths(direction: Direction, strengths: Sequence[float]) -> list[float]:
    """The strengths to try: both ways where a direction has no end that is meant."""
    ways = (1.0,) if direction.method is DirectionMethod.labels else (1.0, -1.0)
    return [way * strength for strength in strengths for way in ways]


def best_by_attribute(scores: list[DirectionScore], recognizable: list[bool]) -> list[DirectionScore]:
    """For each attribute the score that meets the criterion, or comes nearest, in the order of attributes."""
    best: dict[int, DirectionScore] = {}
    for one in scores:
        index = one.target.attribute
        if index not in best or rank_key(one, recognizable) > rank_key(best[index], recognizable):
            best[index] = one
    return [best[index] for index in sorted(best)]


def rank_key(one: DirectionScore, recognizable: list[bool]) -> tuple[bool, float]:
    worst, _ = one.final.largest_other_change(one.target.attribute, recognizable)
    return one.meets_criterion(recognizable), one.final.on - worst
