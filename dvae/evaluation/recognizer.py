"""The recognizer: a small network that learns the classes of real images and says which of them a run's samples show.

It answers two questions that a distance between sets leaves open: is each sample plainly one thing, and does every
class occur? Salimans et al. 2016, section 4, ask the same of a network trained on ImageNet (the Inception score).
A plain classifier is sure of anything, noise and blank images too (all 500 of 500 were an 8, in a trial on digits), so
this one has one class more, "nothing", which it learns from corrupted real images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from torch import nn

from dvae.config.compose import refuse_points
from dvae.data.images import to_float
from dvae.data.loading.order import Order
from dvae.data.shards.reader import Shards
from dvae.errors import UserError, suggest
from dvae.inference import pipeline as pipelines
from dvae.inference.run_images import open_split
from dvae.tracking import pictures
from dvae.tracking.console import Progress
from dvae.utils import atomic_files, rng

WIDTH = 16
"""Channels of the recognizer's first layer."""
SMALLEST_MAP = 4
"""Side of the maps that its last layer sees, in pixels."""
LEARNING_RATE = 2e-3
CORRUPT = 4
"""Of so many images in training one is shown a second time, corrupted."""
SAMPLES_PER_ROW = 16
"""Samples of each class in the picture."""


@dataclass(kw_only=True, slots=True)
class RecognizeConfig:
    """What tools/recognize.py takes."""

    run: str = MISSING
    """A run folder or a bundle."""
    shards: str = ""
    """Folder of the labeled real images (empty: the shards that the run was trained on)."""
    label: str = ""
    """Attribute of the images that is their class (empty: the run's data.label, or the only one that there is)."""
    n: int = 1000
    """Samples that are classified."""
    seed: int = 0
    """Seed of the samples and of the recognizer."""
    confidence: float = 0.9
    """Probability of its class above which a sample counts as recognized."""
    steps: int = 1500
    """Training steps of the recognizer."""
    batch: int = 64
    """Images per step and per forward pass."""
    out: str = "recognized.png"
    """The picture: a row per class and a last row of samples not recognized; figures go into a JSON file beside it."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""
    sampler: Any = None
    """Another sampler than the run's."""


ConfigStore.instance().store(name="recognize_schema", node=RecognizeConfig, provider="dvae")

ReadLabeled = Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]
"""Indices (B,) -> real images (B, C, H, W) uint8 and their classes (B,) int64, or (B, A) of A attributes."""


def build_network(channels: int, size: int, outputs: int) -> nn.Sequential:
    """Convolutions that halve images (B, channels, size, size) until they are small, and a layer to (B, outputs)."""
    layers: list[nn.Module] = []
    inputs, width = channels, WIDTH
    while True:
        layers += [nn.Conv2d(inputs, width, 3, 1 if inputs == channels else 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        size = size if inputs == channels else -(-size // 2)
        if size <= SMALLEST_MAP:
            break
        inputs, width = width, min(2 * width, 4 * WIDTH)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(width * size * size, outputs))


NetworkLoss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of the network, images (B, C, H, W) in [-1, 1] and what is known of them (B, ...): a scalar."""


def train(draw: ReadLabeled, count: int, classes: int, *, steps: int, batch: int, seed: int) -> nn.Module:
    """A recognizer trained on `count` real images, fp32: images (B, C, H, W) in [-1, 1] to logits (B, classes + 1).

    The last logit is "nothing". The same seed and images give the same recognizer.
    """

    def loss(network: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        bad = corrupt(x[: -(-len(x) // CORRUPT)])
        labels = torch.cat([labels, torch.full((len(bad),), classes)])
        return F.cross_entropy(network(torch.cat([x, bad])), labels)

    return fit_network(draw, count, classes + 1, loss, steps=steps, batch=batch, seed=seed)


def fit_network(
    draw: ReadLabeled, count: int, outputs: int, loss: NetworkLoss, *, steps: int, batch: int, seed: int
) -> nn.Module:
    """A network of `outputs` logits that minimizes `loss` over `count` real images, fp32, in evaluation mode.

    Images are shifted by up to a fourteenth of their size, so that a few pixels more to one side do not matter. The
    same seed and images give the same network.
    """
    order = Order(count, rng.child(seed, "judge order"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.child(seed, "judge"))
        images, _ = draw(order.indices(0, 1))
        network = build_network(images.shape[1], images.shape[2], outputs).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        with Progress("recognizer", steps) as progress:
            for step in range(steps):
                images, known = draw(order.indices(step * batch, (step + 1) * batch))
                found = loss(network, random_shift(to_float(images)), known)
                optimizer.zero_grad()
                found.backward()
                optimizer.step()
                schedule.step()
                progress.update(step + 1, len(images), {"loss": float(found.detach())})
    return network.eval().requires_grad_(False)


def random_shift(x: torch.Tensor) -> torch.Tensor:
    """Images x (B, C, S, S), moved together by up to S // 14 pixels in each direction; their border is repeated."""
    most, size = x.shape[2] // 14, x.shape[2]
    if most == 0:
        return x
    top, left = torch.randint(0, 2 * most + 1, (2,)).tolist()
    padded = F.pad(x, (most, most, most, most), mode="replicate")
    return padded[:, :, top : top + size, left : left + size].contiguous(memory_format=torch.channels_last)


def corrupt(x: torch.Tensor) -> torch.Tensor:
    """Images (B, C, S, S), a third each: pixels in any order; quarters exchanged crosswise; one pixel all over."""
    pixels = x.flatten(2)
    mixed = pixels[:, :, torch.randperm(pixels.shape[2])].view_as(x)
    turned = x.roll((x.shape[2] // 2, x.shape[3] // 2), (2, 3))
    flat = pixels.gather(2, torch.randint(0, pixels.shape[2], (len(x), 1, 1)).expand(-1, x.shape[1], 1))
    ways = torch.stack([mixed, turned, flat.unsqueeze(3).expand_as(x)])
    return ways[torch.arange(len(x)) % 3, torch.arange(len(x))]


@torch.no_grad()
def probabilities(network: nn.Module, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """The recognizer's probability of each class and of nothing, (N, K + 1) float32, for images (N, C, H, W) uint8."""
    return torch.cat([network(to_float(part)).softmax(1) for part in images.split(batch)])


def summary(found: torch.Tensor, classes: list[str], confidence: float) -> dict[str, Any]:
    """Figures of probabilities (N, K + 1): the share recognized, and the number of recognized samples by class."""
    certainty, chosen = found[:, :-1].max(1)
    recognized = certainty > confidence
    counts = torch.bincount(chosen[recognized], minlength=len(classes)).tolist()
    return {
        "n": len(found),
        "recognized": float(recognized.float().mean()),
        "nothing": float((found[:, -1] > 0.5).float().mean()),
        "classes_present": sum(count > 0 for count in counts),
        "by_class": dict(zip(classes, counts, strict=True)),
    }


def blend_pairs(images: torch.Tensor) -> torch.Tensor:
    """Each image (N, C, H, W) uint8 laid over another, half and half: strokes of two things, which are neither."""
    return ((images.int() + images.roll(len(images) // 2, 0).int()) // 2).to(torch.uint8)


def recognize_samples(settings: RecognizeConfig) -> dict[str, Any]:
    """Train a recognizer on a run's real images, classify its samples, write picture and figures; returns the figures.

    Held-out images are classified too: as they are, what a perfect model would score, and blended, what a poor one may.
    Raises UserError where the run, its images or their labels are not to be had.
    """
    _check(settings)
    pipeline = pipelines.load(settings.run, settings.batch)
    refuse_points(pipeline.config, settings.run)
    if settings.sampler is not None:
        pipeline.use_sampler(settings.sampler)
    train_set, heldout_set = (
        open_split(settings.run, pipeline.config, split, settings.shards) for split in ("train", "heldout")
    )
    attribute, classes = choose_attribute(settings, pipeline.config.label, train_set)
    network = train(
        labeled_reader(train_set, attribute, classes), len(train_set), len(classes),
        steps=settings.steps, batch=settings.batch, seed=settings.seed,
    )  # fmt: skip
    heldout, truth = labeled_reader(heldout_set, attribute, classes)(np.arange(len(heldout_set)))
    opinion = probabilities(network, heldout, settings.batch)
    with Progress("samples", settings.n) as progress:
        _, samples = pipeline.generate(
            settings.n, settings.seed, advance=lambda count: progress.update(progress.step + count, count)
        )
    found = probabilities(network, samples, settings.batch)
    save_picture(samples, found, settings)
    figures = {
        "run": settings.run,
        "label": attribute,
        "confidence": settings.confidence,
        "nfe": pipeline.nfe,
        "accuracy_heldout": float((opinion.argmax(1) == truth).float().mean()),
        "samples": summary(found, classes, settings.confidence),
        "heldout": summary(opinion, classes, settings.confidence),
        "heldout_blended": summary(
            probabilities(network, blend_pairs(heldout), settings.batch), classes, settings.confidence
        ),
    }
    atomic_files.write_json(Path(settings.out).with_suffix(".json"), figures)
    return figures


def _check(settings: RecognizeConfig) -> None:
    for name in ("n", "steps", "batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: use 1 or more")
    if not 0.0 <= settings.confidence < 1.0:
        raise UserError(f"confidence={settings.confidence} is no probability below 1: use 0.9")


def choose_attribute(settings: RecognizeConfig, learned: str, shards: Shards) -> tuple[str, list[str]]:
    """The attribute that is the class, and its values; `learned` is the one that the run was told, or empty.

    Raises UserError where none is named and there are several or none.
    """
    known = shards.labels
    attribute = settings.label or learned or (next(iter(known)) if len(known) == 1 else "")
    if not known:
        raise UserError(
            f"shards at {shards.folder} have no labels, which the recognizer learns from: use a labeled source"
        )
    if not attribute:
        raise UserError(f"label= is not set and the images have several attributes: name one of {', '.join(known)}")
    if attribute not in known:
        raise UserError(f"label={attribute}: the images have no such attribute: {suggest(attribute, known)}")
    classes = [str(value) for value in known[attribute]]
    if len(classes) < 2:
        raise UserError(f"label={attribute} has one value only, {classes[0]}: name an attribute with two or more")
    return attribute, classes


def labeled_reader(shards: Shards, attribute: str, classes: list[str]) -> ReadLabeled:
    """Images of a split with their classes."""
    numbers = shards.classes(attribute, classes)

    def draw(indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        images = shards.read(indices)
        return images, numbers[torch.from_numpy(shards.substituted(indices))]

    return draw


def save_picture(samples: torch.Tensor, found: torch.Tensor, settings: RecognizeConfig) -> None:
    """The picture: the first recognized samples of each class, a row each, then the first that were not recognized."""
    certainty, chosen = found[:, :-1].max(1)
    recognized = certainty > settings.confidence
    groups = [recognized & (chosen == number) for number in range(found.shape[1] - 1)] + [~recognized]
    rows = []
    for group in groups:
        row = torch.full((SAMPLES_PER_ROW, *samples.shape[1:]), 128, dtype=torch.uint8)  # gray: there are no more
        first = samples[group][:SAMPLES_PER_ROW]
        row[: len(first)] = first
        rows.append(row)
    pictures.grid(torch.cat(rows), Path(settings.out), columns=SAMPLES_PER_ROW, scale=max(1, 56 // samples.shape[2]))
