"""The gallery: scatter plots of 2D points for every process, sampler and number of network evaluations (NFE)."""

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
"""The spacing of the steps with which each sampler was published. All other samplers use quadratic spacing."""

NEAR_FLOOR = 1.5
"""A distance of at most this multiple of the floor is marked green."""


@dataclass(kw_only=True, slots=True)
class GalleryConfig:
    """The settings of tools/gallery.py."""

    runs: str = "runs/toy2d"
    """A folder of runs on points, or the folder of one run."""
    out: str = "gallery.png"
    """The PNG file to write. The distances are written to a JSON file of the same name."""
    density: str = "spirals"
    """The class of points that is drawn."""
    samplers: list[str] = field(default_factory=list)
    """Samplers ([]: all except those of distilled refiners). Each is used on the processes that it can integrate."""
    nfe: list[int] = field(default_factory=lambda: [5, 11, 25, 99])
    """Network evaluations per point (>= 1), one column each. heun can use only odd numbers."""
    tolerances: list[float] = field(default_factory=lambda: [1e-1, 1e-2, 1e-3, 1e-4])
    """Tolerances (> 0) of samplers with adaptive steps (ode), one for each column of `nfe`."""
    n: int = 4000
    """Points per scatter plot (>= 1)."""
    seed: int = 0
    """Seed of the true points and of the noise."""
    batch: int = 4000
    """Points per forward pass (>= 1)."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import. They register components."""


ConfigStore.instance().store(name="gallery_schema", node=GalleryConfig, provider="dvae")


@dataclass(frozen=True)
class GalleryCell:
    """One scatter plot of the gallery."""

    run: str
    """Name of the run."""
    process: str
    """Name of its process."""
    schedule: str
    """Name of its schedule."""
    sampler: str
    """Name of the sampler."""
    fields: dict[str, Any]
    """Settings of the sampler: steps and spacing, or tolerance."""
    column: int
    """Index of the column, from 0."""
    nfe: float
    """Counted network evaluations per point; the mean if they differ between points."""
    distance: float
    """Sliced Wasserstein distance to the true points."""


def check_settings(settings: GalleryConfig) -> GalleryConfig:
    """Raise UserError if a setting is invalid. Returns the settings."""
    for name in ("n", "batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: use 1 or more")
    if not settings.nfe or min(settings.nfe) < 1:
        raise UserError(f"nfe={settings.nfe}: name one or more columns, of 1 or more evaluations")
    if len(settings.tolerances) != len(settings.nfe) or min(settings.tolerances) <= 0:
        raise UserError(f"tolerances={settings.tolerances}: give one above 0 for each column of nfe={settings.nfe}")
    if Path(settings.out).suffix != ".png":
        raise UserError(f"out={settings.out}: the picture is a PNG file, so its name must end in .png")
    for name in settings.samplers:
        SAMPLERS.get(name)
    return settings


def make_gallery(settings: GalleryConfig) -> dict[str, Any]:
    """Write the picture and the JSON file, and return the content of the JSON file.

    Raises UserError if a setting is invalid, or if there are no trained runs on the density.
    """
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
    """Return the folders of trained runs by name: `settings.runs` if it is a run, otherwise the runs in that folder."""
    folder = Path(settings.runs)
    found = [folder] if (folder / "bundle").is_dir() else sorted(path.parent for path in folder.glob("*/bundle"))
    return {path.name: path for path in found}


def load_runs(settings: GalleryConfig) -> dict[str, Pipeline]:
    """Load the trained runs of a folder, by name. Runs whose process has one component (k = 1) are first.

    Raises UserError if there is no run, or if a run is not on points or not on the density.
    """
    folder = Path(settings.runs)
    found = run_folders(settings)
    if not found:
        raise UserError(
            f"runs={folder}: no trained run there: train one with python tools/launch.py recipe=toy2d process=psld"
        )
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
    """Return the chosen samplers that can integrate the process of the run. Raises UserError if there is none."""
    names = compatible_samplers(run.models.denoiser.diffusion, run.models.denoiser.shapes, settings.samplers)
    if not names:
        raise UserError(f"samplers={settings.samplers}: none integrates process={run.config.process.name}")
    return names


def sampler_config(
    run: Pipeline, sampler: str, column: int, settings: GalleryConfig, label: int | None
) -> dict[str, Any]:
    """Return the config of the sampler for a column.

    A sampler with a tolerance gets the tolerance of the column. Every other sampler gets the largest number of steps
    that needs at most the network evaluations of the column.
    """
    node: dict[str, Any] = {"name": sampler, "threshold": "none"}
    if any(f.name == "tolerance" for f in fields(SAMPLERS.get(sampler).Config)):
        return node | {"tolerance": settings.tolerances[column]}
    node["spacing"] = PUBLISHED_SPACING.get(sampler, Spacing.quadratic).name

    def evaluations(steps: int) -> float:
        run.use_sampler(node | {"steps": steps})
        points.sample_points(run, label, 1, settings.seed)
        return run.nfe

    # Binary search. A step takes at least one evaluation, so `nfe` steps are the upper bound. It is tried first,
    # because it is the answer for samplers with exactly one evaluation per step.
    low, high = 1, settings.nfe[column]
    while low < high:
        steps = (low + high + 1) // 2 if high < settings.nfe[column] else high
        low, high = (steps, high) if evaluations(steps) <= settings.nfe[column] else (low, steps - 1)
    return node | {"steps": low}


def make_cell(name: str, run: Pipeline, node: dict[str, Any], column: int, distance: float) -> GalleryCell:
    """Return the record of a cell. `run` must have just drawn its points, because `run.nfe` is read."""
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
    """Write the picture. `clouds` are the points (n, 2) of each cell; the points `true` (n, 2) are beside the title."""
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
    """Return the name of the sampler, followed by the spacing unless it is quadratic."""
    spacing = cell.fields.get("spacing")
    return cell.sampler + (f"\n{spacing}" if spacing not in (None, "quadratic") else "")


def caption(cell: GalleryCell, settings: GalleryConfig) -> str:
    """Return the distance as text, with the counted number of evaluations if it differs from the column's."""
    text = f"{cell.distance:.3f}"
    return text if cell.nfe == settings.nfe[cell.column] else f"{text} ({cell.nfe:.0f})"
