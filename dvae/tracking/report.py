"""report.html: what a run made and measured, on one self-contained page.

What is read from the run folder; each may be missing, and its section is then left out:
- config.yaml: the resolved config ("recipe" and "image_size" go into the heading).
- summary.json: {"recipe": str, "stages": {name: {"seconds", "steps", "images_per_second", "parameters"}}, "evaluation":
  what dvae.evaluation.scorer.score_tensors, or for points dvae.toy2d.evaluate_points.evaluate_points, returns}. Any
  figure of a stage may be missing or null.
- metrics.jsonl: rows {"stage", "step", "loss", ...}. Of the encoder also "reconstruction" and "kl", and with a
  discriminator "generator", "discriminator", "adaptive_weight", "confidence_real", "confidence_fake"; of the refiner
  "loss_t0" to "loss_t9", the loss for t in (0, 0.1], ..., (0.9, 1]; of the classifier these, and "accuracy" likewise.
- images/points.png: true points over drawn ones, of a run on points.
- images/: grids of 8 columns. vae_samples.png and refined_samples.png from the same z; heldout.png, reconstructions.png
  and refined_reconstructions.png of the same images.
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
"""Pixels; wider pictures are scaled down, so that the page stays light."""
PIXELS = 2**26
"""Pixels of a picture, at most: a decoded one takes four bytes for each."""
PICTURE_LIMIT = 2**28
"""Bytes of the file of a picture."""
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
"""Figures of metrics.jsonl that are drawn over the steps, and what they are called."""
CONFIDENCE = {"confidence_real": "images", "confidence_fake": "reconstructions"}
"""Probabilities that the discriminator gives to being real, drawn in one chart."""


@dataclass(frozen=True)
class Picture:
    """An image of the page."""

    title: str
    caption: str
    alt: str
    uri: str
    width: int
    height: int
    sharp: bool
    """Whether it is small, so that its pixels are shown as squares."""


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup


def write_report(run_folder: Path) -> Path:
    """Write report.html, in one rename, and return its path.

    Raises UserError if there is no such folder, MachineError for a damaged file in it.
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
    """The line under the title."""
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
        ("vae_samples", "VAE samples", "Decoded from a latent z: the right idea, but blurry."),
        ("refined_samples", "Refined samples", "The same z in the same places, after the diffusion refiner."),
    ]
    return [picture for name, title, caption in named if (picture := _picture(folder / f"{name}.png", title, caption))]


def _reconstructions(folder: Path) -> list[Picture]:
    named = [
        ("heldout", "Held-out images", "Real images that training never saw."),
        ("reconstructions", "Reconstructions", "Encoded and decoded again by the VAE."),
        ("refined_reconstructions", "Refined reconstructions", "Those reconstructions, refined."),
    ]
    return [picture for name, title, caption in named if (picture := _picture(folder / f"{name}.png", title, caption))]


def _scatter(folder: Path) -> Picture | None:
    return _picture(folder / "points.png", "True and drawn points", "A column for each density.")


def _points(evaluation: Evaluation) -> list[dict[str, str]]:
    """Rows of the table of distances, a class each."""

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
    """The PNG as a data: URI. Raises MachineError for a file that is no PNG, and for one of too many pixels."""
    if not path.exists():
        return None
    try:
        data = read_bytes(path, PICTURE_LIMIT)
        with warnings.catch_warnings():  # Pillow warns of large images in lines of its own
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.width * image.height > PIXELS:
            raise DamagedFile(path, f"has {image.width}x{image.height} pixels, more than {PIXELS}")
        image.load()
    except DamagedFile as error:
        raise MachineError(f"{error}; run the evaluate stage again") from None
    except Exception as error:  # noqa: BLE001 damaged bytes make the decoder raise nearly anything
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
    """How faithful reconstructions are, in a sentence; empty where there are none."""
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
    """KID-lite0 of each set and of the first floor, for the large figures at the top."""
    named = _sets(evaluation) | dict(list(_floors(evaluation).items())[:1])
    return [{"name": name, "value": _figure(found.kid)} for name, found in named.items() if found.kid]


def _table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Rows of the metrics table; the floors last."""
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
    """Mean ± standard error, with as many digits as the error (or else the size) warrants."""
    if not figure:
        return "–"
    digits = 1 if abs(figure.mean) >= 10 else 4
    return f"{figure.mean:.{digits}f}" + (f" ± {figure.se:.{digits}f}" if figure.se is not None else "")


def _protocol(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The protocol as names and texts, hashes shortened."""

    def text(name: str, value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {item}" for key, item in value.items())
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return f"{value[:12]}…" if name.endswith("sha256") and isinstance(value, str) else str(value)

    return [(name.replace("_", " "), text(name, value)) for name, value in (evaluation.protocol or {}).items()]


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Curves of each stage, and what there is by time."""
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
    """Mean of a figure in each tenth of t, over the first and over the last tenth of the rows."""
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
    """Rows of the timings table."""

    def row(name: str, stage: StageRecord) -> dict[str, str]:
        return {
            "name": name,
            "time": clock(stage.seconds) if stage.seconds is not None else "–",
            "steps": f"{stage.steps:,}" if stage.steps is not None else "–",
            "speed": f"{stage.images_per_second:,.0f}" if stage.images_per_second is not None else "–",
            "parameters": f"{stage.parameters / 1e6:.1f} M" if stage.parameters is not None else "–",
        }

    return [row(name, stage) for name, stage in (summary.stages or {}).items()]
