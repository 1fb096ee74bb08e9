"""Write report.html, which shows the results of a run on one self-contained page.

The report reads the following files of the run folder. If a file is missing, its section is left out.

- config.yaml: the resolved config. "recipe" and "image_size" are shown in the heading.
- summary.json: {"recipe": str, "stages": {name: {"seconds", "steps", "images_per_second", "parameters"}},
  "evaluation": {...}}. Any value of a stage may be missing or null. "evaluation" is the result of
  dvae.evaluation.scorer.score_tensors, or of dvae.toy2d.evaluate_points.evaluate_points for a run on points.
- metrics.jsonl: rows {"stage", "step", "loss", ...} with more metrics by stage:
  - Encoder: "reconstruction" and "kl". With a discriminator also "generator", "discriminator", "adaptive_weight",
    "confidence_real" and "confidence_fake".
  - Refiner: "loss_t0" to "loss_t9", the loss for t in (0, 0.1], ..., (0.9, 1].
  - Classifier: the same as the refiner, and "accuracy" and "accuracy_t0" to "accuracy_t9".
- images/points.png: for a run on points, scatter plots of true points above those of drawn points.
- images/: image grids with 8 columns. vae_samples.png and refined_samples.png come from the same latents z.
  heldout.png, reconstructions.png and refined_reconstructions.png show the same images.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from dvae.errors import MachineError, UserError, fold
from dvae.tracking.charts import Line, line_chart
from dvae.tracking.console import clock
from dvae.tracking.metrics_log import MetricsLog
from dvae.tracking.summary import ClassOfPoints, Evaluation, Figure, SetFigures, StageRecord, Summary, read_summary
from dvae.utils import atomic_files, package
from dvae.utils.read import YAML_LIMIT, DamagedFile, read_bytes, read_text, read_yaml

WIDEST = 1600
"""Maximum width of a picture in pixels. Wider pictures are scaled down to keep the page small."""
PIXELS = 2**26
"""Maximum number of pixels of a picture. Each takes four bytes of memory when it is decoded."""
PICTURE_LIMIT = 2**28
"""Maximum size of a picture file in bytes."""
SETS = {"vae": "VAE samples", "refined": "Refined samples", "reconstructions": "Reconstructions"}
FLOORS = {"heldout": "Real: held-out images", "reference halves": "Real: part of the reference against its rest"}

CURVES = {
    "loss": "loss",
    "reconstruction": "reconstruction error",
    "kl": "KL to the prior",
    "KID-lite0": "KID-lite0 of the averaged weights",
    "FID-lite0": "FID-lite0 of the averaged weights",
    "sliced_wasserstein": "sliced Wasserstein distance of the averaged weights",
    "accuracy": "accuracy on training images",
    "generator": "adversarial loss of the decoder",
    "discriminator": "loss of the discriminator",
    "adaptive_weight": "weight of the adversarial loss",
}
"""The metrics of metrics.jsonl that are plotted against the step, and their titles."""
CONFIDENCE = {"confidence_real": "images", "confidence_fake": "reconstructions"}
"""The probabilities of "real" that the discriminator assigns. They share one chart."""


@dataclass(frozen=True)
class Picture:
    """An image of the page."""

    title: str
    caption: str
    alt: str
    uri: str
    """The PNG file as a data: URI."""
    width: int
    height: int
    sharp: bool
    """Whether the page shows the pixels of a small picture as sharp squares."""


@dataclass(frozen=True)
class Chart:
    """A line chart of the page."""

    title: str
    svg: Markup


def write_report(run_folder: Path) -> Path:
    """Write report.html atomically, and return its path.

    Raises UserError if the folder does not exist, and MachineError if a file in it is damaged.
    """
    if not run_folder.is_dir():
        raise UserError(f"run={run_folder}: no such folder; give the folder of a run")
    summary = _summary(run_folder / "summary.json")
    config_path = run_folder / "config.yaml"
    config = read_yaml(config_path) if config_path.exists() else {}
    rows = MetricsLog(run_folder / "metrics.jsonl").rows()
    evaluation = summary.evaluation or Evaluation()
    page = _template().render(
        title=summary.recipe or config.get("recipe") or run_folder.resolve().name,
        facts=_facts(summary, config),
        results=_results(evaluation),
        points=_points(evaluation),
        fidelity=_fidelity(evaluation),
        scatter=_scatter(run_folder / "images"),
        samples=_samples(run_folder / "images"),
        reconstructions=_reconstructions(run_folder / "images"),
        table=_table(evaluation),
        protocol=_protocol(evaluation),
        charts=_charts(rows),
        stages=_stages(summary),
        config=read_text(config_path, YAML_LIMIT) if config_path.exists() else "",
        version=package.VERSION,
    )
    path = run_folder / "report.html"
    atomic_files.write_text(path, page)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dvae.tracking", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")


def _summary(path: Path) -> Summary:
    try:
        return read_summary(path)
    except DamagedFile as error:
        raise MachineError(f"{path}: damaged ({error.reason}); run the evaluate stage again") from None


def _facts(summary: Summary, config: Mapping[str, Any]) -> list[str]:
    """Return the items of the line under the title: image size, stages and total time."""
    stages = summary.stages or {}
    size = config.get("image_size")
    seconds = sum(stage.seconds or 0 for stage in stages.values())
    facts = [
        f"{size} × {size} pixels" if size else "",
        " → ".join(stages),
        f"{clock(seconds)} in all" if seconds else "",
    ]
    return [fact for fact in facts if fact]


def _samples(folder: Path) -> list[Picture]:
    named = [
        ("vae_samples", "VAE samples", "Decoded by the VAE from random latents z."),
        ("refined_samples", "Refined samples", "The VAE samples after the diffusion refiner, in the same order."),
    ]
    return [picture for name, title, caption in named if (picture := _picture(folder / f"{name}.png", title, caption))]


def _reconstructions(folder: Path) -> list[Picture]:
    named = [
        ("heldout", "Held-out images", "Real images that were not used in training."),
        ("reconstructions", "Reconstructions", "The held-out images, encoded and decoded by the VAE."),
        ("refined_reconstructions", "Refined reconstructions", "The reconstructions after the diffusion refiner."),
    ]
    return [picture for name, title, caption in named if (picture := _picture(folder / f"{name}.png", title, caption))]


def _scatter(folder: Path) -> Picture | None:
    return _picture(folder / "points.png", "True and drawn points", "One column per density.")


def _points(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return the rows of the table of distances, one per class."""

    def text(distance: Figure) -> str:
        return f"{distance.mean:.4f}" + (f" ± {distance.se:.4f}" if distance.se is not None else "")

    def ratio(found: ClassOfPoints) -> str:
        return f"{found.sliced_wasserstein.mean / found.floor.mean:.2f}" if found.floor.mean else "–"

    classes = (evaluation.points.classes if evaluation.points else None) or {}
    return [
        {
            "name": name,
            "distance": text(found.sliced_wasserstein),
            "floor": text(found.floor),
            "ratio": ratio(found),
        }
        for name, found in classes.items()
    ]


def _picture(path: Path, title: str, caption: str) -> Picture | None:
    """Load a PNG file for the page. Returns None if the file is missing.

    Raises MachineError if the file is not a readable PNG or has too many pixels.
    """
    if not path.exists():
        return None
    try:
        data = read_bytes(path, PICTURE_LIMIT)
        with warnings.catch_warnings():  # Pillow only warns of a very large image: turn the warning into an error
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.width * image.height > PIXELS:
            raise DamagedFile(path, f"has {image.width}x{image.height} pixels, more than {PIXELS}")
        image.load()
    except DamagedFile as error:
        raise MachineError(f"{error}; run the evaluate stage again") from None
    except Exception as error:  # noqa: BLE001 for damaged bytes, the decoder may raise an error of any type
        raise MachineError(f"{path}: not a readable PNG ({fold(error)[:200]}); run the evaluate stage again") from None
    if image.width > WIDEST:
        height = max(1, round(image.height * WIDEST / image.width))
        image = image.resize((WIDEST, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = buffer.getvalue()
    uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    alt = f"{title}. {caption}"
    return Picture(title, caption, alt, uri, image.width, image.height, sharp=image.width < 800)


def _fidelity(evaluation: Evaluation) -> str:
    """Return a sentence with the PSNR of the reconstructions, or "" if there are none."""
    found = evaluation.reconstructions
    if not found:
        return ""
    size = " × ".join(str(side) for side in found.latent)
    return f"PSNR {found.psnr:.1f} dB on average over {found.n} images, from a latent of {size} numbers."


def _sets(evaluation: Evaluation) -> dict[str, SetFigures]:
    return {SETS.get(name, name): found for name, found in (evaluation.sets or {}).items()}


def _floors(evaluation: Evaluation) -> dict[str, SetFigures]:
    return {FLOORS.get(name, name): found for name, found in (evaluation.floor or {}).items()}


def _results(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return KID-lite0 of each set and of the first floor, for the tiles at the top."""
    named = _sets(evaluation) | dict(list(_floors(evaluation).items())[:1])
    return [{"name": name, "value": _figure(found.kid)} for name, found in named.items() if found.kid]


def _table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the rows of the metrics table. The floors are last."""
    sets, floors = _sets(evaluation), _floors(evaluation)
    return [
        {
            "name": name,
            "real": name in floors,
            "kid": _figure(found.kid),
            "fid": _figure(found.fid),
            "n": found.n,
            "n_reference": found.n_reference,
            "times": len(found.kid.per_seed if found.kid else []),
        }
        for name, found in {**sets, **floors}.items()
    ]


def _figure(figure: Figure | None) -> str:
    """Format mean ± standard error: 1 decimal if |mean| >= 10, otherwise 4. "–" for None."""
    if not figure:
        return "–"
    digits = 1 if abs(figure.mean) >= 10 else 4
    return f"{figure.mean:.{digits}f}" + (f" ± {figure.se:.{digits}f}" if figure.se is not None else "")


def _protocol(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return the protocol as pairs of names and texts. Hashes are cut to 12 characters."""

    def text(name: str, value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {item}" for key, item in value.items())
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return f"{value[:12]}…" if name.endswith("sha256") and isinstance(value, str) else str(value)

    return [(name.replace("_", " "), text(name, value)) for name, value in (evaluation.protocol or {}).items()]


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return the charts of each stage: metrics against the step, and losses and accuracies against the time t."""
    charts = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        for name, title in CURVES.items():
            if svg := line_chart([_line(mine, name, title)], "step", title):
                charts.append(Chart(f"{stage}: {title}", Markup(svg)))
        title = "probability of being real, by the discriminator"
        if svg := line_chart([_line(mine, name, kind) for name, kind in CONFIDENCE.items()], "step", title):
            charts.append(Chart(f"{stage}: {title}", Markup(svg)))
        for name in ("loss", "accuracy"):
            if svg := line_chart(_by_time(mine, name), "time t (0 clean, 1 noise)", name, dots=True):
                charts.append(Chart(f"{stage}: {name} by time", Markup(svg)))
    return charts


def _line(rows: Sequence[Mapping[str, Any]], name: str, title: str) -> Line:
    return Line(title, [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)])


def _by_time(rows: Sequence[Mapping[str, Any]], name: str) -> list[Line]:
    """Return two lines with the mean of a metric in each tenth of t.

    One is for the first tenth of the rows, the other for the last tenth. A single row gives only the last line.
    """
    part = max(1, len(rows) // 10)
    lines = []
    for title, some in (("first tenth of training", rows[:part]), ("last tenth of training", rows[-part:])):
        points = []
        for i in range(10):
            values = [row[f"{name}_t{i}"] for row in some if isinstance(row.get(f"{name}_t{i}"), int | float)]
            if values:
                points.append(((i + 0.5) / 10, sum(values) / len(values)))
        lines.append(Line(title, points))
    return lines if len(rows) > 1 else lines[-1:]


def _stages(summary: Summary) -> list[dict[str, str]]:
    """Return the rows of the timings table, one per stage."""

    def row(name: str, stage: StageRecord) -> dict[str, str]:
        return {
            "name": name,
            "time": clock(stage.seconds) if stage.seconds is not None else "–",
            "steps": f"{stage.steps:,}" if stage.steps is not None else "–",
            "speed": f"{stage.images_per_second:,.0f}" if stage.images_per_second is not None else "–",
            "parameters": f"{stage.parameters / 1e6:.1f} M" if stage.parameters is not None else "–",
        }

    return [row(name, stage) for name, stage in (summary.stages or {}).items()]
