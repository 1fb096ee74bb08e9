"""Report the scores of directions: tables as Markdown, all figures as JSON, and edited faces as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dvae.evaluation.directions.attribute_recognizer import AttributeRecognizer
from dvae.evaluation.directions.direction_scores import (
    MAX_CHANGED,
    MIN_TURNED_ON,
    DirectionScore,
    EditEffect,
    HeldoutFaces,
    best_by_attribute,
)
from dvae.inference.directions.direction_settings import DirectionsConfig
from dvae.tracking import pictures
from dvae.utils import atomic_files
from dvae.utils.text_tables import markdown_table

STRIP_STRENGTHS = [-1.0, -0.5, 0.0, 0.5, 1.0]
"""Strengths of a face in the picture, as multiples of the chosen strength."""
FACES_PER_STRIP = 3
"""Number of faces of each direction in the picture."""


@dataclass(frozen=True)
class DirectionReport:
    """The scores of a run's directions, with the settings and data that they were computed with."""

    settings: DirectionsConfig
    recognizer: AttributeRecognizer
    scores: list[DirectionScore]
    """One score for each direction."""
    test: HeldoutFaces
    """The faces that the directions were scored on."""
    nfe: float
    """Network evaluations per refined image."""
    encoder_sha256: str
    """Hash of the encoder whose latents the directions belong to."""

    @property
    def names(self) -> list[str]:
        """Names of the attributes."""
        return self.recognizer.attributes.names

    @property
    def best(self) -> list[DirectionScore]:
        """The best direction of each attribute."""
        return best_by_attribute(self.scores, self.recognizer.recognizable)

    @property
    def passed(self) -> list[DirectionScore]:
        """The best direction of each attribute that has a direction which meets the criterion."""
        return [one for one in self.best if one.meets_criterion(self.recognizer.recognizable)]

    def write(self, path: Path) -> None:
        """Write the tables to `path`, and all figures to a JSON file of the same name."""
        atomic_files.write_json(path.with_suffix(".json"), self.figures())
        atomic_files.write_text(path, "\n".join(self.lines()) + "\n")

    def unchanged(self, stage: str) -> list[float]:
        """For each attribute, the share of test faces whose recognized value at strength 0 equals their label."""
        return (self.test.before[stage] == self.test.truth).double().mean(0).tolist()

    def target(self, one: DirectionScore) -> str:
        """The attribute and value that a direction is scored for, as "attribute=value"."""
        name = self.names[one.target.attribute]
        return f"{name}={self.recognizer.attributes.values[name][one.target.value]}"

    def figures(self) -> dict[str, Any]:
        """All figures and settings, JSON-ready."""
        settings = self.settings
        return {
            "run": settings.run,
            "encoder_sha256": self.encoder_sha256,
            "seed": settings.seed,
            "validation": settings.validation,
            "n": settings.n,
            "strengths": list(settings.strengths),
            "nfe": self.nfe,
            "criterion": {"on_at_least": MIN_TURNED_ON, "every_other_changes_in_less_than": MAX_CHANGED},
            "judge": {
                name: {"accuracy_heldout": right, "most_frequent": chance, "told": recognizable}
                for name, right, chance, recognizable in zip(
                    self.names,
                    self.recognizer.accuracy,
                    self.recognizer.chance,
                    self.recognizer.recognizable,
                    strict=True,
                )
            },
            "attributes_skipped": self.recognizer.attributes.skipped,
            "strength_0_as_labeled": {
                stage: dict(zip(self.names, self.unchanged(stage), strict=True)) for stage in self.test.before
            },
            "directions": [self._figures(one) for one in self.scores],
            "attributes_that_meet_it": [self.names[one.target.attribute] for one in self.passed],
        }

    def _figures(self, one: DirectionScore) -> dict[str, Any]:
        return {
            "name": one.direction.name,
            "method": one.direction.method.name,
            "target": self.target(one),
            "strength": one.strength,
            "meets": one.meets_criterion(self.recognizer.recognizable),
            "validation": self._effect(one.chosen_by),
            **{stage: self._effect(effect) for stage, effect in one.stages.items()},
        }

    def _effect(self, effect: EditEffect) -> dict[str, Any]:
        return asdict(effect) | {"changed": dict(zip(self.names, effect.changed, strict=True))}

    def lines(self) -> Iterator[str]:
        """The tables, as Markdown."""
        settings = self.settings
        yield f"# Directions of {settings.run}"
        yield ""
        yield (
            f"Encoder {self.encoder_sha256[:12]}, seed {settings.seed}. Strength chosen from "
            f"{', '.join(f'{value:g}' for value in settings.strengths)} on {settings.validation} held-out images, "
            f"figures from {settings.n} others. Refined with {self.nfe:g} network evaluations."
        )
        yield ""
        yield from self._about_attributes()
        yield ""
        yield from self._about_directions()
        yield ""
        yield from self._about_changes()
        yield ""
        yield self.summary()

    def summary(self) -> str:
        """One line: how many attributes have a direction that meets the criterion, and which."""
        able = sum(self.recognizer.recognizable)
        passed = ", ".join(f"{self.names[one.target.attribute]} ({one.direction.name})" for one in self.passed)
        return (
            f"{len(self.passed)} of {able} recognizable attributes have a direction that meets it: {passed or 'none'}."
        )

    def _about_attributes(self) -> Iterator[str]:
        stages = list(self.test.before)
        yield "Accuracy of the recognizer, and share of faces that are recognized as labeled at strength 0:"
        yield ""
        rows = []
        unchanged = [self.unchanged(stage) for stage in stages]
        for i, name in enumerate(self.names):
            note = "" if self.recognizer.recognizable[i] else " (not recognizable)"
            figures = [self.recognizer.accuracy[i], self.recognizer.chance[i], *(one[i] for one in unchanged)]
            rows.append([name + note, *map(percent, figures)])
        header = ["attribute", "accuracy", "most frequent", *(f"{stage} as labeled" for stage in stages)]
        yield markdown_table(header, rows)

    def _about_directions(self) -> Iterator[str]:
        stages = list(self.test.before)
        yield (
            f"Of the faces that lack the value, the share that shows it after the edit; and the largest change of "
            f"another attribute. A direction meets the criterion with {percent(MIN_TURNED_ON)} or more and less than "
            f"{percent(MAX_CHANGED)}, in {stages[-1]}:"
        )
        yield ""
        columns = [word for stage in stages for word in (f"on, {stage}", f"largest other, {stage}")]
        rows = []
        for one in self.scores:
            cells = []
            for effect in one.stages.values():
                share, other = effect.largest_other_change(one.target.attribute, self.recognizer.recognizable)
                cells += [percent(effect.on), f"{percent(share)} {self.names[other]}"]
            meets = "yes" if one.meets_criterion(self.recognizer.recognizable) else "no"
            head = [one.direction.name, self.target(one), f"{one.strength:g}", str(one.final.faces)]
            rows.append([*head, *cells, meets])
        yield markdown_table(["direction", "turns on", "strength", "faces", *columns, "meets"], rows)

    def _about_changes(self) -> Iterator[str]:
        stages = " / ".join(self.test.before)
        yield f"Share of faces in which the recognized value of each attribute differs from strength 0, {stages}:"
        yield ""
        rows = []
        for one in self.scores:
            changed = zip(*(effect.changed for effect in one.stages.values()), strict=True)
            rows.append([one.direction.name, *(" / ".join(map(percent, cell)) for cell in changed)])
        yield markdown_table(["direction", *self.names], rows)


def percent(share: float) -> str:
    """A share as a whole percentage."""
    return f"{100 * share:.0f}%"


RenderLatents = Callable[[torch.Tensor, list[int]], dict[str, torch.Tensor]]
"""render(latents (n, *latent), numbers of their noise) returns images (n, C, H, W) uint8 at each stage."""


def write_strips(report: DirectionReport, render: RenderLatents, path: Path) -> None:
    """Draw the best direction of each attribute, on faces that lack its value.

    Each face is shown at several strengths, from minus the chosen strength to the chosen strength. The first row of a
    direction shows x_hat, the second one refined images.
    """
    rows = []
    for one in report.best:
        lacking = (report.test.truth[:, one.target.attribute] != one.target.value).nonzero().flatten()[:FACES_PER_STRIP]
        z = report.test.z[lacking].repeat_interleave(len(STRIP_STRENGTHS), 0)
        strengths = torch.tensor(STRIP_STRENGTHS).repeat(len(lacking)) * one.strength
        numbers = [report.test.numbers[face] for face in lacking.repeat_interleave(len(STRIP_STRENGTHS)).tolist()]
        for images in render(one.direction.move(z, strengths), numbers).values():
            # The row stays white on the right if there are fewer faces.
            row = images.new_full((FACES_PER_STRIP * len(STRIP_STRENGTHS), *images.shape[1:]), 255)
            row[: len(images)] = images
            rows.append(row)
    pictures.grid(
        torch.cat(rows), path, columns=FACES_PER_STRIP * len(STRIP_STRENGTHS), scale=max(1, 64 // rows[0].shape[2])
    )
