"""Report the results of a study as a table and a picture, with the measurement protocol."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dvae.evaluation.metric_plots import COLORS, style_axes
from dvae.evaluation.metrics import packages
from dvae.experiments.study.equivalence import ImageDifference
from dvae.experiments.study.study_runs import KID, VAE, StudyPoints
from dvae.experiments.study.study_spec import StudyConfig
from dvae.utils import atomic_files
from dvae.utils.machine import cores
from dvae.utils.text_tables import markdown_table


def write(
    settings: StudyConfig, points: StudyPoints, seconds: Mapping[str, float], differences: Mapping[int, ImageDifference]
) -> str:
    """Write study.png and study.md in the study's folder. Returns the table.

    `seconds` maps each part of the work to its wall-clock seconds. `differences` maps each seed to the result of
    `compare_formulations`.
    """
    out = Path(settings.out)
    floor = next(iter(points[VAE].values()))["floor"]
    table = kid_table(settings, points, floor)
    plot_kid(settings, points, floor, out / "study.png")
    text = "\n\n".join([table, protocol(settings, points), cost(seconds), equivalence_text(differences)])
    atomic_files.write_text(out / "study.md", text + "\n")
    return table


def kid_table(settings: StudyConfig, points: StudyPoints, floor: Mapping[str, Any]) -> str:
    """Return a table of 1000 x KID-lite0: mean over seeds and standard error.

    Each row is an arm, each column a number of steps. `floor` holds the scores of real images against real images.
    """
    blank = [""] * (len(settings.steps) - 1)
    rows = [
        [arm, *(format_kid(lockstep[steps]["sets"][arm][KID]) for steps in settings.steps)]
        for arm, lockstep in points.items()
        if arm != VAE
    ]
    rows.append([f"{VAE} (no refiner)", format_kid(points[VAE][0]["sets"][VAE][KID]), *blank])
    rows += [[f"floor: {name}", format_kid(found[KID]), *blank] for name, found in floor.items()]
    return markdown_table(["", *(f"{steps} steps" for steps in settings.steps)], rows)


def format_kid(found: Mapping[str, Any]) -> str:
    """Format 1000 x mean and 1000 x standard error."""
    error = "" if found["se"] is None else f" ± {1000 * found['se']:.1f}"
    return f"{1000 * found['mean']:.1f}{error}"


def protocol(settings: StudyConfig, points: StudyPoints) -> str:
    """Describe the measurement protocol. Tables are comparable only if their protocols agree."""
    about = points[VAE][0]["protocol"]
    versions = ", ".join(f"{name} {version}" for name, version in packages().items())
    return (
        f"The table shows 1000 x KID-lite0, as mean ± standard error over {len(settings.seeds)} seeds of training and "
        f"sampling ({', '.join(map(str, settings.seeds))}). Each set has {about['n']} images. It is compared with "
        f"{about['n_reference']} training images of {about['image_size']}x{about['image_size']}, in "
        f"{about['kid_subsets']} subsets of {about['kid_subset_size']} images. "
        f"Metric: {about['backend']}, {about['extractor']} "
        f"({about['weights_sha256'][:12]}), resize: {about['resize']}. Sampling: {samplers(points)}. "
        f"Machine: {platform.machine()}, {cores()} core{'s' * (cores() != 1)}, no GPU requested. Versions: {versions}."
    )


def samplers(points: StudyPoints) -> str:
    """Describe the sampler of each arm and its network evaluations per step."""
    used: dict[str, list[str]] = {}
    for arm, lockstep in points.items():
        for steps, point in lockstep.items():
            if arm != VAE:
                nfe = point["protocol"]["nfe"] / steps
                name = f"{point['protocol']['sampler'].get('name', '-')}, {nfe:g} evaluation{'s' * (nfe != 1)} per step"
                used.setdefault(name, []).append(arm)
    if len(used) == 1:
        return f"sampler {next(iter(used))}"
    return "; ".join(f"{', '.join(dict.fromkeys(arms))}: sampler {name}" for name, arms in used.items())


def cost(seconds: Mapping[str, float]) -> str:
    """Describe the wall-clock time that the study took."""
    spent = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    return f"Wall-clock minutes, all seeds together: {spent}; {sum(seconds.values()) / 60:.0f} in total."


def equivalence_text(differences: Mapping[int, ImageDifference]) -> str:
    """Describe the result of the check of formulation 2."""
    if not differences:
        return "No arm uses formulation 1, so formulation 2 was not compared with it."
    worst = max(difference.gray_levels for difference in differences.values())
    share = max(difference.share for difference in differences.values())
    return (
        f"Formulation 2 with the same weights, converted to its coordinates, was compared with formulation 1. The "
        f"largest difference between their images is {worst} gray level{'s' * (worst != 1)}"
        + (f", in {100 * share:.3g}% of the values." if worst else ".")
    )


def plot_kid(settings: StudyConfig, points: StudyPoints, floor: Mapping[str, Any], path: Path) -> None:
    """Plot KID against steps, with a line and standard errors for each arm.

    Horizontal lines mark the VAE alone and the floor, which is the KID of real images against real images.
    """
    plot = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(plot)
    axes = plot.add_subplot()
    arms = [arm for arm in points if arm != VAE]
    for arm, color in zip(arms, COLORS * len(arms), strict=False):
        found = [points[arm][steps]["sets"][arm][KID] for steps in settings.steps]
        means, errors = [f["mean"] for f in found], [f["se"] or 0.0 for f in found]
        axes.errorbar(settings.steps, means, errors, label=arm, color=color, marker="o", capsize=3, lw=1.6)
    axes.axhline(points[VAE][0]["sets"][VAE][KID]["mean"], color="#1c1b19", ls=":", lw=1.2, label=VAE)
    level = min(found[KID]["mean"] for found in floor.values())
    axes.axhline(level, color="#1c1b19", lw=1.0, label="real against real")
    axes.set(xscale="log")
    axes.set_ylim(bottom=min(0.0, level))
    style_axes(axes, "network evaluations per image", f"{KID} (less is better)")
    axes.set_xticks(settings.steps, [str(steps) for steps in settings.steps])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)
    atomic_files.write_file(path, lambda aside: plot.savefig(aside, format="png"))
