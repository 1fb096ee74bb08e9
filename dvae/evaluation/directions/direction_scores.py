"""Score a direction: which attributes it changes, according to an attribute recognizer.

The strength is chosen on validation faces, and the score is computed on test faces; both are held-out. Each edited face
is compared with itself at strength 0, with the same noise. So changes by encoding and refining alone do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dvae.inference.directions.direction import Direction, DirectionMethod

MIN_TURNED_ON = 0.8
"""Criterion: at least this share of the faces that lack the value must show it after the edit."""
MAX_CHANGED = 0.2
"""Criterion: every other recognizable attribute must change in less than this share of the faces."""

RecognizeLatents = Callable[[torch.Tensor, list[int]], dict[str, torch.Tensor]]
"""recognize(latents (n, *latent), numbers of their noise) returns the recognized attributes (n, A) at each stage.

The stages are "x_hat" and, if the refiner draws pixels, "refined"."""


@dataclass(frozen=True)
class HeldoutFaces:
    """Held-out faces to edit, and their recognized attributes at strength 0."""

    z: torch.Tensor
    """(n, *latent): posterior means."""
    truth: torch.Tensor
    """(n, A) int64: values of the attributes according to the labels."""
    numbers: list[int]
    """Number of the noise of each face."""
    before: dict[str, torch.Tensor]
    """Stage -> (n, A) int64: recognized values at strength 0."""

    def __getitem__(self, chosen: torch.Tensor) -> HeldoutFaces:
        """The faces for which `chosen`, a boolean mask (n,), is true."""
        numbers = [number for number, wanted in zip(self.numbers, chosen.tolist(), strict=True) if wanted]
        before = {stage: codes[chosen] for stage, codes in self.before.items()}
        return HeldoutFaces(self.z[chosen], self.truth[chosen], numbers, before)


@dataclass(frozen=True)
class EditEffect:
    """The effect of an edit on faces that lack a value: neither their label nor the recognizer at strength 0 has it."""

    faces: int
    """Number of these faces."""
    on: float
    """Share of them that show the value after the edit; 0 if there are no faces."""
    changed: list[float]
    """For each attribute, the share of them whose recognized value changed."""

    def largest_other_change(self, attribute: int, recognizable: Sequence[bool]) -> tuple[float, int]:
        """The largest change among recognizable attributes other than `attribute`, and the index of that attribute.

        Returns (0, attribute) if there is no other.
        """
        others = [(share, i) for i, share in enumerate(self.changed) if i != attribute and recognizable[i]]
        return max(others, default=(0.0, attribute))


@dataclass(frozen=True)
class TargetValue:
    """A value of an attribute, both by index."""

    attribute: int
    """Index of the attribute."""
    value: int
    """Index of the value among the attribute's values."""


@dataclass(frozen=True)
class DirectionScore:
    """The score of a direction at the strength that was chosen for it."""

    direction: Direction
    target: TargetValue
    """The value that the direction turns on."""
    strength: float
    """The chosen strength."""
    chosen_by: EditEffect
    """Effect on the validation faces at the last stage. Strength and target were chosen by it."""
    stages: dict[str, EditEffect]
    """Stage -> effect on the test faces. Stages are x_hat and, if the refiner draws pixels, refined."""

    @property
    def final(self) -> EditEffect:
        """Effect at the last stage, which is what a user sees."""
        return list(self.stages.values())[-1]

    def meets_criterion(self, recognizable: Sequence[bool]) -> bool:
        """Whether the direction meets the criterion at the last stage; see the function `meets_criterion`."""
        return meets_criterion(self.final, self.target, recognizable)


def meets_criterion(effect: EditEffect, target: TargetValue, recognizable: Sequence[bool]) -> bool:
    """Whether an effect meets the criterion.

    The attribute of `target` must be recognizable, and its value turned on in at least MIN_TURNED_ON of the faces.
    Every other recognizable attribute must change in less than MAX_CHANGED of them.
    """
    worst, _ = effect.largest_other_change(target.attribute, recognizable)
    return recognizable[target.attribute] and effect.on >= MIN_TURNED_ON and worst < MAX_CHANGED


def edit_effect(truth: torch.Tensor, before: torch.Tensor, after: torch.Tensor, target: TargetValue) -> EditEffect:
    """Compute the effect of an edit on `target`.

    Args:
        truth: Values of the attributes by label, (n, A) int64.
        before: Recognized values at strength 0, (n, A) int64.
        after: Recognized values after the edit, (n, A) int64.
        target: The value that should be turned on.
    """
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
    """Choose strength and target of a direction on the validation faces, and score it with them on the test faces.

    An option is selective if every other recognizable attribute changes in less than MAX_CHANGED of the faces. The best
    option is the selective one with the largest share turned on. If none is selective, it is the one with the largest
    difference of the share turned on and the largest other change. Ties go to the smaller strength.
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
    """Yield each target with the effects of the direction on `faces`, by stage."""
    wanted = torch.zeros(len(faces.z), dtype=torch.bool)
    for target in targets:  # a face whose label shows all targets counts for none of them, so it is not drawn
        wanted |= faces.truth[:, target.attribute] != target.value
    chosen = faces[wanted]
    after = recognize(direction.move(chosen.z, strength), chosen.numbers) if len(chosen.z) else chosen.before
    for target in targets:
        yield (
            target,
            {stage: edit_effect(chosen.truth, chosen.before[stage], codes, target) for stage, codes in after.items()},
        )


def candidate_strengths(direction: Direction, strengths: Sequence[float]) -> list[float]:
    """The strengths to try. A direction that was found without labels has no preferred sign, so both are tried."""
    ways = (1.0,) if direction.method is DirectionMethod.labels else (1.0, -1.0)
    return [way * strength for strength in strengths for way in ways]


def best_by_attribute(scores: list[DirectionScore], recognizable: list[bool]) -> list[DirectionScore]:
    """For each attribute, the score that meets the criterion or comes closest to it, in the order of attributes."""
    best: dict[int, DirectionScore] = {}
    for one in scores:
        index = one.target.attribute
        if index not in best or rank_key(one, recognizable) > rank_key(best[index], recognizable):
            best[index] = one
    return [best[index] for index in sorted(best)]


def rank_key(one: DirectionScore, recognizable: list[bool]) -> tuple[bool, float]:
    """Sort key of scores: whether the criterion is met, then the share turned on minus the largest other change."""
    worst, _ = one.final.largest_other_change(one.target.attribute, recognizable)
    return one.meets_criterion(recognizable), one.final.on - worst
