"""What a direction changes and what it leaves alone, as a judge of attributes sees it.

The strength is chosen on some held-out faces and the figures are taken on others. Each edited face is compared with
itself at strength 0 under the same noise, so that what encoding and refining change by themselves is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dvae.inference.directions.direction import Direction, Method

TURNED_ON = 0.8
"""Share of the faces that lack a value which must show it, for a direction to count."""
CHANGED = 0.2
"""Share of faces below which every other attribute must change."""

Look = Callable[[torch.Tensor, list[int]], dict[str, torch.Tensor]]
"""Latents (n, *latent) and the numbers of their noise -> the judged value of each attribute (n, A) of their x_hat and,
where there is a refiner, after it: {"x_hat": ..., "refined": ...}."""


@dataclass(frozen=True)
class Faces:
    """Held-out faces to edit, and how they look at strength 0."""

    z: torch.Tensor
    """(n, *latent): posterior means."""
    truth: torch.Tensor
    """(n, A) int64: what their labels say."""
    numbers: list[int]
    """The number of each one's noise."""
    before: dict[str, torch.Tensor]
    """Judged at strength 0, at each stage (n, A)."""

    def __getitem__(self, chosen: torch.Tensor) -> Faces:
        """Those where chosen (n,) is true."""
        numbers = [number for number, wanted in zip(self.numbers, chosen.tolist(), strict=True) if wanted]
        before = {stage: codes[chosen] for stage, codes in self.before.items()}
        return Faces(self.z[chosen], self.truth[chosen], numbers, before)


@dataclass(frozen=True)
class Effect:
    """What happened to the faces that lack a value, by their label and as judged at strength 0."""

    faces: int
    on: float
    """Share of them that show it afterwards; 0 where there are none."""
    changed: list[float]
    """Share of them of which the judged value of each attribute changed."""

    def worst(self, attribute: int, told: Sequence[bool]) -> tuple[float, int]:
        """The largest change of an attribute that the judge can tell, other than `attribute`, and which that is; 0 of
        `attribute` where it can tell no other."""
        others = [(share, i) for i, share in enumerate(self.changed) if i != attribute and told[i]]
        return max(others, default=(0.0, attribute))


@dataclass(frozen=True)
class Target:
    """A value of an attribute, by their numbers."""

    attribute: int
    value: int


@dataclass(frozen=True)
class Score:
    """A direction's figures at the strength that was chosen for it."""

    direction: Direction
    target: Target
    strength: float
    chosen_by: Effect
    """On the validation faces, at the last stage."""
    stages: dict[str, Effect]
    """On the test faces: of x_hat and, where there is a refiner, after it."""

    @property
    def final(self) -> Effect:
        """At the last stage: what a user sees."""
        return list(self.stages.values())[-1]

    def meets(self, told: Sequence[bool]) -> bool:
        """Whether it turns its value on often enough, and changes little else."""
        return meets(self.final, self.target, told)


def meets(effect: Effect, target: Target, told: Sequence[bool]) -> bool:
    """Whether a value that the judge can tell is turned on in TURNED_ON of the faces, and every other attribute that it
    can tell changes in less than CHANGED of them."""
    worst, _ = effect.worst(target.attribute, told)
    return told[target.attribute] and effect.on >= TURNED_ON and worst < CHANGED


def effect_on(truth: torch.Tensor, before: torch.Tensor, after: torch.Tensor, target: Target) -> Effect:
    """Of codes (n, A): by label, as judged at strength 0, and as judged after the edit."""
    column = target.attribute
    lacking = (truth[:, column] != target.value) & (before[:, column] != target.value)
    count = int(lacking.sum())
    if count == 0:
        return Effect(0, 0.0, [0.0] * truth.shape[1])
    on = (after[lacking, column] == target.value).double().mean()
    return Effect(count, float(on), (after != before)[lacking].double().mean(0).tolist())


def score(
    direction: Direction,
    targets: Sequence[Target],
    look: Look,
    validation: Faces,
    test: Faces,
    strengths: Sequence[float],
    told: Sequence[bool],
) -> Score:
    """A direction's score at the strength, and for the target, that is best on the validation faces.

    Best is the largest share turned on among those that change every other attribute in less than CHANGED of the
    faces; where none does, the largest share turned on less the largest change.
    """
    options = []
    for strength in strengths_of(direction, strengths):
        for target, effects in _effects(direction, strength, targets, look, validation):
            options.append((target, strength, list(effects.values())[-1]))

    def goodness(option: tuple[Target, float, Effect]) -> tuple[bool, float, float]:
        target, strength, effect = option
        worst, _ = effect.worst(target.attribute, told)
        fine = worst < CHANGED
        return fine, effect.on if fine else effect.on - worst, -abs(strength)

    target, strength, chosen_by = max(options, key=goodness)
    ((_, stages),) = _effects(direction, strength, [target], look, test)
    return Score(direction, target, strength, chosen_by, stages)


def _effects(
    direction: Direction, strength: float, targets: Sequence[Target], look: Look, faces: Faces
) -> Iterator[tuple[Target, dict[str, Effect]]]:
    """The effect on faces for each target, at each stage."""
    wanted = torch.zeros(len(faces.z), dtype=torch.bool)
    for target in targets:  # a face that shows all of them by its label is in no figure: it is not drawn
        wanted |= faces.truth[:, target.attribute] != target.value
    chosen = faces[wanted]
    after = look(direction.move(chosen.z, strength), chosen.numbers) if len(chosen.z) else chosen.before
    for target in targets:
        yield (
            target,
            {stage: effect_on(chosen.truth, chosen.before[stage], codes, target) for stage, codes in after.items()},
        )


def strengths_of(direction: Direction, strengths: Sequence[float]) -> list[float]:
    """The strengths to try: both ways where a direction has no end that is meant."""
    ways = (1.0,) if direction.method is Method.labels else (1.0, -1.0)
    return [way * strength for strength in strengths for way in ways]


def best_by_attribute(scores: list[Score], told: list[bool]) -> list[Score]:
    """For each attribute the score that meets the criterion, or comes nearest, in the order of attributes."""
    best: dict[int, Score] = {}
    for one in scores:
        index = one.target.attribute
        if index not in best or merit(one, told) > merit(best[index], told):
            best[index] = one
    return [best[index] for index in sorted(best)]


def merit(one: Score, told: list[bool]) -> tuple[bool, float]:
    worst, _ = one.final.worst(one.target.attribute, told)
    return one.meets(told), one.final.on - worst
