"""A small network that learns the classes of real images, and recognizes them in a run's samples.

It answers two questions that a distance between sets cannot: Does each sample clearly show one class? Does every class
occur? The Inception score (Salimans et al. 2016, section 4) asks the same with a network trained on ImageNet.

A plain classifier is confident on any input, even noise and blank images. In a trial on digits it classified 500 of 500
such images as an 8. Therefore the recognizer has an additional class "nothing", which it learns from corrupted images.
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
"""Channels of the first layer."""
SMALLEST_MAP = 4
"""Largest side of the feature maps before the last layer, in pixels."""
LEARNING_RATE = 2e-3
"""Highest learning rate of the one-cycle schedule."""
CORRUPT = 4
"""One of this many training images is used a second time, corrupted."""
SAMPLES_PER_ROW = 16
"""Number of samples of each class in the picture."""


@dataclass(kw_only=True, slots=True)
class RecognizeConfig:
    """Settings of tools/recognize.py."""

    run: str = MISSING
    """Run folder or bundle."""
    shards: str = ""
    """Folder of labeled real images (empty: the shards that the run was trained on)."""
    label: str = ""
    """Attribute of the images that is their class (empty: the run's data.label, or the only attribute)."""
    n: int = 1000
    """Number of samples to classify."""
    seed: int = 0
    """Seed of the samples and of the recognizer."""
    confidence: float = 0.9
    """A sample counts as recognized if the probability of its class is above this; at least 0 and below 1."""
    steps: int = 1500
    """Number of training steps of the recognizer."""
    batch: int = 64
    """Number of images per training step and per forward pass."""
    out: str = "recognized.png"
    """Picture: a row for each class, then a row of samples not recognized. A JSON file of this name gets the counts."""
    plugins: list[str] = field(default_factory=list)
    """Python modules to import first. They register components."""
    sampler: Any = None
    """A sampler to use instead of the run's, or fields of the run's sampler to change."""


ConfigStore.instance().store(name="recognize_schema", node=RecognizeConfig, provider="dvae")

ReadLabeled = Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]
"""read(indices (B,)) returns real images (B, C, H, W) uint8, and their classes (B,) or A attributes (B, A), int64."""


def build_network(channels: int, size: int, outputs: int) -> nn.Sequential:
    """Build a network from images (B, channels, size, size) to logits (B, outputs).

    Convolutions halve the image until its side is at most SMALLEST_MAP. A linear layer follows.
    """
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
"""loss(network, images (B, C, H, W) in [-1, 1], their classes or attributes (B, ...)) returns a scalar."""


def train(draw: ReadLabeled, count: int, classes: int, *, steps: int, batch: int, seed: int) -> nn.Module:
    """Train a recognizer on `count` real images. The same seed and images give the same recognizer.

    Returns a network in fp32 from images (B, C, H, W) in [-1, 1] to logits (B, classes + 1). The last logit is the
    class "nothing".
    """

    def loss(network: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        bad = corrupt(x[: -(-len(x) // CORRUPT)])
        labels = torch.cat([labels, torch.full((len(bad),), classes)])
        return F.cross_entropy(network(torch.cat([x, bad])), labels)

    return fit_network(draw, count, classes + 1, loss, steps=steps, batch=batch, seed=seed)


def fit_network(
    draw: ReadLabeled, count: int, outputs: int, loss: NetworkLoss, *, steps: int, batch: int, seed: int
) -> nn.Module:
    """Train a network with `outputs` logits to minimize `loss` over `count` real images.

    Images are shifted at random by up to a fourteenth of their size, so that the network does not depend on exact
    positions. The same seed and images give the same network. It is in fp32 and in evaluation mode.
    """
    order = Order(count, rng.child(seed, "judge order"))
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state unchanged
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
    """Shift images x (B, C, S, S), all alike, by up to S // 14 pixels in each direction. Borders are replicated."""
    most, size = x.shape[2] // 14, x.shape[2]
    if most == 0:
        return x
    top, left = torch.randint(0, 2 * most + 1, (2,)).tolist()
    padded = F.pad(x, (most, most, most, most), mode="replicate")
    return padded[:, :, top : top + size, left : left + size].contiguous(memory_format=torch.channels_last)


def corrupt(x: torch.Tensor) -> torch.Tensor:
    """Corrupt images (B, C, S, S) in one of three ways each.

    The ways are: shuffle the pixels, exchange the quarters of the image diagonally, or fill the image with one pixel.
    """
    pixels = x.flatten(2)
    mixed = pixels[:, :, torch.randperm(pixels.shape[2])].view_as(x)
    turned = x.roll((x.shape[2] // 2, x.shape[3] // 2), (2, 3))
    flat = pixels.gather(2, torch.randint(0, pixels.shape[2], (len(x), 1, 1)).expand(-1, x.shape[1], 1))
    ways = torch.stack([mixed, turned, flat.unsqueeze(3).expand_as(x)])
    return ways[torch.arange(len(x)) % 3, torch.arange(len(x))]


@torch.no_grad()
def probabilities(network: nn.Module, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Probabilities of the K classes and of "nothing", (N, K + 1) float32, for images (N, C, H, W) uint8."""
    return torch.cat([network(to_float(part)).softmax(1) for part in images.split(batch)])


def summary(found: torch.Tensor, classes: list[str], confidence: float) -> dict[str, Any]:
    """Summarize probabilities (N, K + 1): the share of recognized images, and the number of them in each class.

    "nothing" is the share of images for which the class "nothing" has a probability above 0.5.
    """
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
    """Average each image (N, C, H, W) uint8 with another one. The result shows parts of two classes, and is neither."""
    return ((images.int() + images.roll(len(images) // 2, 0).int()) // 2).to(torch.uint8)


def recognize_samples(settings: RecognizeConfig) -> dict[str, Any]:
    """Train a recognizer on a run's real images, and classify the run's samples.

    Writes a picture and a JSON file, and returns the contents of the latter. Held-out images are classified too. As
    they are, they give the score of a perfect model. Averaged in pairs, they show what a poor model may score. Raises
    UserError if the run, its images or their labels cannot be found.
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
    """Raise UserError if a setting is out of range."""
    for name in ("n", "steps", "batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: use 1 or more")
    if not 0.0 <= settings.confidence < 1.0:
        raise UserError(f"confidence={settings.confidence} is not a probability below 1: use 0.9")


def choose_attribute(settings: RecognizeConfig, learned: str, shards: Shards) -> tuple[str, list[str]]:
    """Choose the attribute that is the class. Returns its name and its values.

    `learned` is the attribute that the run was trained with, or empty. Raises UserError if the images have no labels,
    if the choice is not unique, or if the attribute has fewer than two values.
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
    """A function that reads images of a split with their classes."""
    numbers = shards.classes(attribute, classes)

    def draw(indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        images = shards.read(indices)
        return images, numbers[torch.from_numpy(shards.substituted(indices))]

    return draw


def save_picture(samples: torch.Tensor, found: torch.Tensor, settings: RecognizeConfig) -> None:
    """Draw the first recognized samples of each class, one row each, and then the first that were not recognized."""
    certainty, chosen = found[:, :-1].max(1)
    recognized = certainty > settings.confidence
    groups = [recognized & (chosen == number) for number in range(found.shape[1] - 1)] + [~recognized]
    rows = []
    for group in groups:
        # The row stays gray on the right if there are fewer samples.
        row = torch.full((SAMPLES_PER_ROW, *samples.shape[1:]), 128, dtype=torch.uint8)
        first = samples[group][:SAMPLES_PER_ROW]
        row[: len(first)] = first
        rows.append(row)
    pictures.grid(torch.cat(rows), Path(settings.out), columns=SAMPLES_PER_ROW, scale=max(1, 56 // samples.shape[2]))
