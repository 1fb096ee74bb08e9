"""Detect memorization: compare the distances of samples to their nearest training image with held-out real images.

Held-out images, which the model has never seen, have a nearest training image too. If the model has learned the
distribution, samples are about as far from the training images as held-out images are. If it has memorized training
images, samples are closer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dvae.errors import UserError
from dvae.evaluation.image_sets import ImageSet
from dvae.evaluation.metric_plots import COLORS, DPI, INK_COLOR, style_axes
from dvae.evaluation.sample_scores import EvaluationContext
from dvae.utils import atomic_files

BLOCK = 1024
"""Number of training images that are compared at a time."""
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5)
"""Quantiles of distances in the report."""
NEAR = 0.01
"""A sample counts as near if its distance is below this quantile of the distances of held-out images."""


@dataclass(frozen=True)
class NearestImages:
    """For each of N images, the nearest image of another set."""

    distance: torch.Tensor
    """(N,), float64: root mean square difference of pixels, in gray levels (0 to 255), or of features."""
    index: torch.Tensor
    """(N,), int64: index of the nearest image in the other set."""


def nearest(images: torch.Tensor, others: list[torch.Tensor]) -> NearestImages:
    """For each row of `images` (N, D), find the nearest among the rows of all blocks `others` (m, D), by L2 / sqrt(D).

    Distances are exact up to rounding in float64. Because of it, the distance of a copy is not exactly 0, but at most
    1e-5 of the root mean square of its values.
    """
    x = images.double()
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(x), dtype=torch.int64)
    start = 0
    for block in others:
        y = block.double()
        # |x - y|^2 = |x|^2 + |y|^2 - 2 x y. Rounding can make it slightly negative for copies, hence the clamp.
        squared = (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2.0 * x @ y.T).clamp(min=0.0)
        low, at = squared.min(1)
        better = low < best
        best = torch.where(better, low, best)
        index = torch.where(better, at + start, index)
        start += len(block)
    return NearestImages((best / x.shape[1]).sqrt(), index)


def require_heldout(context: EvaluationContext) -> None:
    """Raise UserError if there are no held-out images to compare with."""
    if context.scorer.heldout is None:
        raise UserError("memorization= compares with held-out images: the reference must be shards that have some")


def report(context: EvaluationContext, samples: ImageSet, picture: Path) -> dict[str, Any]:
    """Compute the distances of samples and held-out images to their nearest training images, and draw the picture.

    Call `require_heldout` first. Returns the report, JSON-ready.
    """
    reference, heldout = context.scorer.reference, context.scorer.heldout
    assert heldout is not None  # see require_heldout
    real, unseen = context.scorer.real_features()
    assert unseen is not None
    (drawn,) = context.scorer.set_features({"samples": [samples]})["samples"]
    starts = range(0, len(reference), BLOCK)
    ours, theirs = _pixels(samples, 0, len(samples)), _pixels(heldout, 0, len(heldout))
    pixels_of_ours, pixels_of_theirs = (
        nearest(x, [_pixels(reference, i, min(i + BLOCK, len(reference))) for i in starts]) for x in (ours, theirs)
    )
    blocks = list(real.pooled.split(BLOCK))
    spaces = {
        "pixels": (pixels_of_ours, pixels_of_theirs),
        "features": (nearest(drawn.pooled, blocks), nearest(unseen.pooled, blocks)),
    }
    shown = spaces["pixels"][0].distance.argsort()[: context.settings.memorization].tolist()
    plot_nearest(reference, samples, spaces, shown, picture)
    return {
        "n": len(samples),
        "n_heldout": len(heldout),
        "n_reference": len(reference),
        "unit": {"pixels": "root mean square, gray levels of 255", "features": "root mean square"},
        **{space: distance_summary(*pair) for space, pair in spaces.items()},
        "nearest": [
            {"sample": k, "training_image_by_pixels": int(spaces["pixels"][0].index[k]),
             "training_image_by_features": int(spaces["features"][0].index[k]),
             "distance_in_pixels": float(spaces["pixels"][0].distance[k])}
            for k in shown
        ],
    }  # fmt: skip


def _pixels(images: ImageSet, start: int, stop: int) -> torch.Tensor:
    """Pixels of the images start to stop - 1, one row each."""
    return images.read(start, stop).flatten(1)


def distance_summary(samples: NearestImages, heldout: NearestImages) -> dict[str, Any]:
    """Quantiles of the distances of samples and held-out images, and the share of samples that are near (see NEAR).

    The share is about 1% if no sample is a copy.
    """

    def quantiles(found: NearestImages) -> dict[str, float]:
        return {f"{q:g}": float(found.distance.quantile(q)) for q in QUANTILES}

    limit = heldout.distance.quantile(NEAR)
    share_near = float((samples.distance < limit).double().mean())
    return {"samples": quantiles(samples), "heldout": quantiles(heldout), "share_of_samples_near": share_near}


def plot_nearest(
    reference: ImageSet,
    samples: ImageSet,
    spaces: dict[str, tuple[NearestImages, NearestImages]],
    shown: list[int],
    picture: Path,
) -> None:
    """Draw the samples `shown` with their nearest training images by pixels and by features, and the distances.

    The distances are drawn as histograms, in pixels and in features, of samples and of held-out images.
    """
    figure = Figure(figsize=(11, 1.2 + 1.0 * -(-len(shown) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    halves = figure.add_gridspec(1, 2, width_ratios=(1.1, 1))
    left, right = figure.add_subfigure(halves[0, 0]), figure.add_subfigure(halves[0, 1])
    rows = -(-len(shown) // 2)
    columns = [("sample", None), ("in pixels", "pixels"), ("in features", "features")]
    axes = left.subplots(rows, 6, squeeze=False)
    for plot in axes.flat:
        plot.axis("off")
    for place, k in enumerate(shown):
        for column, (title, space) in enumerate(columns):
            plot = axes[place % rows, 3 * (place // rows) + column]
            images, at = (samples, k) if space is None else (reference, int(spaces[space][0].index[k]))
            plot.imshow(images.read(at, at + 1)[0].permute(1, 2, 0).numpy(), interpolation="nearest")
            if place % rows == 0:
                plot.set_title(title, fontsize=8, color=INK_COLOR)
    left.suptitle("samples nearest to a training image, and that image", fontsize=9, color=INK_COLOR)
    for plot, (space, (ours, theirs)) in zip(right.subplots(2, 1), spaces.items(), strict=True):
        both = np.concatenate([ours.distance.numpy(), theirs.distance.numpy()])
        bins = np.linspace(both.min(), both.max(), 40)
        for name, found, color in (("samples", ours, COLORS[1]), ("held-out images", theirs, COLORS[0])):
            plot.hist(found.distance.numpy(), bins, density=True, alpha=0.55, color=color, label=name)
        style_axes(plot, f"distance to the nearest training image in {space}", "density")
        plot.legend(fontsize=8, frameon=False)
    atomic_files.write_file(picture, lambda aside: figure.savefig(aside, dpi=DPI, format="png"))
