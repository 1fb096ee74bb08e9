"""The gallery: what every sampler makes of every process at few and at many network evaluations, on points."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore

from dvae.diffusion.time_grid import Spacing
from dvae.errors import UserError, suggest
from dvae.evaluation.sliced_wasserstein import DIRECTIONS, sliced_wasserstein
from dvae.inference import pipeline as pipelines
from dvae.inference.pipeline import Pipeline
from dvae.registry.processes.base import PROCESSES
from dvae.registry.samplers.base import SAMPLERS, compatible_samplers
from dvae.registry.schedules.base import SCHEDULES
from dvae.runs.folder import Run
from dvae.toy2d import point_scores, points
from dvae.tracking import scatter_grid
from dvae.tracking.console import Progress
from dvae.utils import atomic_files

PUBLISHED_SPACING = {"heun": Spacing.karras, "dpmpp_2m": Spacing.log_snr, "unipc": Spacing.log_snr}
"""Steps that a sampler was published with; quadratic for the others."""

NEAR_FLOOR = 1.5
"""Multiple of the floor up to which a distance is marked."""


@dataclass(kw_only=True, slots=True)
class GalleryConfig:
    """What tools/gallery.py takes."""

    runs: str = "runs/toy2d"
    """Folder of runs on points, or one run."""
    out: str = "gallery.png"
    """The picture; its figures go into a JSON file of the same name beside it."""
    density: str = "spirals"
    """Class that is drawn."""
    samplers: list[str] = field(default_factory=list)
    """Samplers ([]: all but those of distilled refiners); each is used on the processes that it integrates."""
    nfe: list[int] = field(default_factory=lambda: [5, 11, 25, 99])
    """Network evaluations per point, a column each; heun hits odd ones only."""
    tolerances: list[float] = field(default_factory=lambda: [1e-1, 1e-2, 1e-3, 1e-4])
    """Of samplers that choose their steps by one (ode), a column each."""
    n: int = 4000
    """Points per cell."""
    seed: int = 0
    """Seed of the points and of the noise."""
    batch: int = 4000
    """Points per forward pass."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""


ConfigStore.instance().store(name="gallery_schema", node=GalleryConfig, provider="dvae")


@dataclass(frozen=True)
class GalleryCell:
    """One panel of the gallery."""

    run: str
    process: str
    schedule: str
    sampler: str
    fields: dict[str, Any]
    """The sampler's settings: steps and spacing, or tolerance."""
    column: int
    nfe: float
    """Network evaluations per point, as counted; their mean where points differ."""
    distance: float
    """Sliced Wasserstein distance to the true points."""


def check_settings(settings: GalleryConfig) -> GalleryConfig:
    """Refuse words that cannot be drawn. Raises UserError."""
    for name in ("n", "batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: use 1 or more")
    if not settings.nfe or min(settings.nfe) < 1:
        raise UserError(f"nfe={settings.nfe}: name one or more columns, of 1 or more evaluations")
    if len(settings.tolerances) != len(settings.nfe) or min(settings.tolerances) <= 0:
        raise UserError(f"tolerances={settings.tolerances}: give one above 0 for each column of nfe={settings.nfe}")
    if Path(settings.out).suffix != ".png":
        raise UserError(f"out={settings.out}: the picture is a PNG file, name it so")
    for name in settings.samplers:
        SAMPLERS.get(name)
    return settings


def make_gallery(settings: GalleryConfig) -> dict[str, Any]:
    """Write picture and figures; returns the figures. Raises UserError where there are no runs of that density."""
    check_settings(settings)
    runs = load_runs(settings)
    first = Run(run_folders(settings)[next(iter(runs))]).config()
    source = points.open_source(first)
    label = points.label_groups(first, source)[settings.density]
    true = points.true_points(source, label, settings.n, settings.seed)
    floor = point_scores.floor(source, label, settings.n)
    rows = {name: usable_samplers(run, settings) for name, run in runs.items()}
    cells: list[GalleryCell] = []
    clouds: list[torch.Tensor] = []
    with Progress("gallery", sum(map(len, rows.values())) * len(settings.nfe)) as progress:
        for name, run in runs.items():
            for sampler in rows[name]:
                for column in range(len(settings.nfe)):
                    node = sampler_config(run, sampler, column, settings, label)
                    run.use_sampler(node)
                    cloud = points.sample_points(run, label, settings.n, settings.seed)
                    cells.append(make_cell(name, run, node, column, sliced_wasserstein(cloud, true)))
                    clouds.append(cloud)
                    progress.update(len(cells), settings.n)
    figures = {
        "density": settings.density,
        "n": settings.n,
        "seed": settings.seed,
        "directions": DIRECTIONS,
        "columns": {"nfe": list(settings.nfe), "tolerances": list(settings.tolerances)},
        "floor": floor,
        "cells": [asdict(cell) for cell in cells],
    }
    draw_picture(settings, cells, clouds, true, floor)
    atomic_files.write_json(Path(settings.out).with_suffix(".json"), figures)
    return figures


def run_folders(settings: GalleryConfig) -> dict[str, Path]:
    """The folders of trained runs, by the names of the runs: those below `settings.runs`, or that one itself."""
    folder = Path(settings.runs)
    found = [folder] if (folder / "bundle").is_dir() else sorted(path.parent for path in folder.glob("*/bundle"))
    return {path.name: path for path in found}


def load_runs(settings: GalleryConfig) -> dict[str, Pipeline]:
    """The trained runs of a folder by name, processes of one component first. Raises UserError where there is none."""
    folder = Path(settings.runs)
    found = run_folders(settings)
    if not found:
        raise UserError(f"runs={folder}: no trained run there: python tools/launch.py recipe=toy2d process=psld")
    runs = {}
    for name, path in found.items():
        run = pipelines.load(path)
        run.batch = settings.batch
        if not run.config.draws_points:
            raise UserError(f"runs={folder}: {path} holds images, the gallery shows points (recipe=toy2d)")
        config = Run(path).config()
        names = points.label_groups(config, points.open_source(config))
        if settings.density not in names:
            raise UserError(f"density={settings.density}: {path} draws others; {suggest(settings.density, names)}")
        runs[name] = run
    return dict(sorted(runs.items(), key=lambda item: item[1].models.denoiser.shapes.k))


def usable_samplers(run: Pipeline, settings: GalleryConfig) -> list[str]:
    """Those samplers asked for that integrate the run's process. Raises UserError where none does."""
    names = compatible_samplers(run.models.denoiser.diffusion, run.models.denoiser.shapes, settings.samplers)
    if not names:
        raise UserError(f"samplers={settings.samplers}: none integrates process={run.config.process.name}")
    return names


def sampler_config(
    run: Pipeline, sampler: str, column: int, settings: GalleryConfig, label: int | None
) -> dict[str, Any]:
    """The sampler's config node for a column: by tolerance, or the most steps that need no more evaluations."""
    node: dict[str, Any] = {"name": sampler, "threshold": "none"}
    if any(f.name == "tolerance" for f in fields(SAMPLERS.get(sampler).Config)):
        return node | {"tolerance": settings.tolerances[column]}
    node["spacing"] = PUBLISHED_SPACING.get(sampler, Spacing.quadratic).name

    def evaluations(steps: int) -> float:
        run.use_sampler(node | {"steps": steps})
        points.sample_points(run, label, 1, settings.seed)
        return run.nfe

    low, high = 1, settings.nfe[column]  # at least one evaluation a step, and more for more steps
    while low < high:
        steps = (low + high + 1) // 2 if high < settings.nfe[column] else high
        low, high = (steps, high) if evaluations(steps) <= settings.nfe[column] else (low, steps - 1)
    return node | {"steps": low}


def make_cell(name: str, run: Pipeline, node: dict[str, Any], column: int, distance: float) -> GalleryCell:
    diffusion = run.models.denoiser.diffusion
    return GalleryCell(
        run=name,
        process=PROCESSES.name_of(diffusion.process),
        schedule=SCHEDULES.name_of(diffusion.schedule),
        sampler=node["name"],
        fields={key: value for key, value in node.items() if key != "name"},
        column=column,
        nfe=run.nfe,
        distance=distance,
    )


def draw_picture(
    settings: GalleryConfig,
    cells: list[GalleryCell],
    clouds: list[torch.Tensor],
    true: torch.Tensor,
    floor: dict[str, Any],
) -> None:
    """Draw the picture: `clouds` (n, 2) of the cells, `true` (n, 2) beside the title."""
    limit = NEAR_FLOOR * floor["mean"]
    panels = [
        scatter_grid.Panel(
            cell.run, row_name(cell), cell.column, cloud, caption(cell, settings), cell.distance <= limit
        )
        for cell, cloud in zip(cells, clouds, strict=True)
    ]
    title = (
        f"{settings.density}: process x sampler x network evaluations (NFE)\n"
        f"{settings.n} points each. Below: sliced Wasserstein distance to {settings.n} true points (gray).\n"
        f"Two sets of true points are {floor['mean']:.3f} apart; green: at most {NEAR_FLOOR:g} times that."
    )
    scatter_grid.draw(panels, [f"NFE {nfe}" for nfe in settings.nfe], true, title, Path(settings.out))


def row_name(cell: GalleryCell) -> str:
    spacing = cell.fields.get("spacing")
    return cell.sampler + (f"\n{spacing}" if spacing not in (None, "quadratic") else "")


def caption(cell: GalleryCell, settings: GalleryConfig) -> str:
    """The distance, and the true number of evaluations where it is not the column's."""
    text = f"{cell.distance:.3f}"
    return text if cell.nfe == settings.nfe[cell.column] else f"{text} ({cell.nfe:.0f})"
