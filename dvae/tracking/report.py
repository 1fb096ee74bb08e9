"""report.html: what a run made and measured, on one self-contained page.

What is read from the run folder; each may be missing, and its section is then left out:
- config.yaml: the resolved config ("recipe" and "image_size" go into the heading).
- summary.json: {"recipe": str, "stages": {name: {"seconds", "steps", "images_per_second", "parameters"}}, "evaluation":
  what dvae.evaluation.score.score, or for points dvae.evaluation.points.evaluate_points, returns}. Any figure of a
  stage may be missing or null.
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
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from omegaconf import OmegaConf
from PIL import Image

import dvae
from dvae import files
from dvae.errors import MachineError, UserError
from dvae.tracking.charts import Line, line_chart
from dvae.tracking.console import clock
from dvae.tracking.metrics import MetricsLog

WIDEST = 1600
"""Pixels; wider pictures are scaled down, so that the page stays light."""
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
    """Write report.html, in one rename, and return its path. Raises UserError where there is no such folder."""
    if not run_folder.is_dir():
        raise UserError(f"run={run_folder}: no such folder; give the folder of a run")
    summary = _json(run_folder / "summary.json")
    config_path = run_folder / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8") if config_path.exists() else ""
    config = OmegaConf.to_container(OmegaConf.create(config_text)) if config_text else {}
    rows = MetricsLog(run_folder / "metrics.jsonl").rows()
    evaluation = summary.get("evaluation") or {}
    page = _template().render(
        title=summary.get("recipe") or _get(config, "recipe") or run_folder.resolve().name,
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
        config=config_text,
        version=dvae.__version__,
    )
    path = run_folder / "report.html"
    files.write_text(path, page)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dvae.tracking", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MachineError(f"{path}: damaged ({error}); run the evaluate stage again") from None
    return value if isinstance(value, dict) else {}


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else None


def _facts(summary: Mapping[str, Any], config: Any) -> list[str]:
    """The line under the title."""
    stages = summary.get("stages") or {}
    size = _get(config, "image_size")
    seconds = sum(stage.get("seconds") or 0 for stage in stages.values())
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


def _points(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of distances, a class each."""

    def text(distance: Mapping[str, Any]) -> str:
        return f"{distance['mean']:.4f}" + (f" ± {distance['se']:.4f}" if distance["se"] is not None else "")

    return [
        {
            "name": name,
            "distance": text(figures["sliced_wasserstein"]),
            "floor": text(figures["floor"]),
            "ratio": f"{figures['sliced_wasserstein']['mean'] / figures['floor']['mean']:.2f}",
        }
        for name, figures in ((evaluation.get("points") or {}).get("classes") or {}).items()
    ]


def _picture(path: Path, title: str, caption: str) -> Picture | None:
    """The PNG as a data: URI."""
    if not path.exists():
        return None
    data = path.read_bytes()
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError) as error:
        raise MachineError(f"{path}: not a readable PNG ({error}); run the evaluate stage again") from None
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = buffer.getvalue()
    uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    alt = f"{title}. {caption}"
    return Picture(title, caption, alt, uri, image.width, image.height, sharp=image.width < 800)


def _fidelity(evaluation: Mapping[str, Any]) -> str:
    """How faithful reconstructions are, in a sentence; empty where there are none."""
    figures = evaluation.get("reconstructions")
    if not figures:
        return ""
    size = " × ".join(str(side) for side in figures["latent"])
    return f"PSNR {figures['psnr']:.1f} dB on average over {figures['n']} images, from a latent of {size} numbers."


def _results(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """KID-lite0 of each set and of the first floor, for the large figures at the top."""
    named = {SETS.get(name, name): figures for name, figures in (evaluation.get("sets") or {}).items()}
    for name, figures in list((evaluation.get("floor") or {}).items())[:1]:
        named[FLOORS.get(name, name)] = figures
    return [{"name": name, "value": _figure(f["KID-lite0"])} for name, f in named.items() if f.get("KID-lite0")]


def _table(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the metrics table; the floors last."""
    sets = {SETS.get(name, name): figures for name, figures in (evaluation.get("sets") or {}).items()}
    floors = {FLOORS.get(name, name): figures for name, figures in (evaluation.get("floor") or {}).items()}
    return [
        {
            "name": name,
            "real": name in floors,
            "kid": _figure(figures.get("KID-lite0")),
            "fid": _figure(figures.get("FID-lite0")),
            "n": figures.get("n"),
            "n_reference": figures.get("n_reference"),
            "times": len((figures.get("KID-lite0") or {}).get("per_seed", [])),
        }
        for name, figures in {**sets, **floors}.items()
    ]


def _figure(figure: Mapping[str, Any] | None) -> str:
    """Mean ± standard error, with as many digits as the error (or else the size) warrants."""
    if not figure:
        return "–"
    mean, se = figure["mean"], figure.get("se")
    digits = 1 if abs(mean) >= 10 else 4
    return f"{mean:.{digits}f}" + (f" ± {se:.{digits}f}" if se is not None else "")


def _protocol(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The protocol as names and texts, hashes shortened."""

    def text(name: str, value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {item}" for key, item in value.items())
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return f"{value[:12]}…" if name.endswith("sha256") else str(value)

    protocol = evaluation.get("protocol") or {}
    return [(name.replace("_", " "), text(name, value)) for name, value in protocol.items()]


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
    return Line(title, [(row["step"], row[name]) for row in rows if row.get(name) is not None])


def _by_time(rows: Sequence[Mapping[str, Any]], name: str) -> list[Line]:
    """Mean of a figure in each tenth of t, over the first and over the last tenth of the rows."""
    part = max(1, len(rows) // 10)
    lines = []
    for title, some in (("first tenth of training", rows[:part]), ("last tenth of training", rows[-part:])):
        points = []
        for i in range(10):
            values = [row[f"{name}_t{i}"] for row in some if row.get(f"{name}_t{i}") is not None]
            if values:
                points.append(((i + 0.5) / 10, sum(values) / len(values)))
        lines.append(Line(title, points))
    return lines if len(rows) > 1 else lines[-1:]


def _stages(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the timings table."""

    def row(name: str, stage: Mapping[str, Any]) -> dict[str, str]:
        seconds, steps = stage.get("seconds"), stage.get("steps")
        speed, parameters = stage.get("images_per_second"), stage.get("parameters")
        return {
            "name": name,
            "time": clock(seconds) if seconds is not None else "–",
            "steps": f"{steps:,}" if steps is not None else "–",
            "speed": f"{speed:,.0f}" if speed is not None else "–",
            "parameters": f"{parameters / 1e6:.1f} M" if parameters is not None else "–",
        }

    return [row(name, stage) for name, stage in (summary.get("stages") or {}).items()]
