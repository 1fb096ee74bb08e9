"""Scoring the directions of a run on held-out images, as tools/directions.py score=true does."""

from __future__ import annotations

from pathlib import Path

import torch

from dvae.data.images import to_uint8
from dvae.data.shards.manifest import HELDOUT, TRAIN
from dvae.data.shards.reader import Shards
from dvae.diffusion.conditioning import Conditioning
from dvae.errors import UserError
from dvae.evaluation.directions import direction_report
from dvae.evaluation.directions.direction_scores import Faces, Target, score
from dvae.inference.directions import attributes as judging
from dvae.inference.directions import direction_files
from dvae.inference.directions.attributes import AttributeJudge, Attributes
from dvae.inference.directions.direction import Direction, Method
from dvae.inference.directions.direction_settings import DirectionsConfig
from dvae.inference.directions.find_directions import chosen, load
from dvae.inference.noise import Noise
from dvae.inference.pipeline import Pipeline
from dvae.inference.run_images import open_split
from dvae.models import bundle
from dvae.tracking.console import Progress
from dvae.utils import rng


class Editor:
    """Makes images of latents, and has them judged. The noise of face k is that of image k of the seed, so that an
    edited face differs from itself at strength 0 by the edit alone."""

    def __init__(self, pipeline: Pipeline, judge: AttributeJudge, seed: int) -> None:
        self.pipeline, self.judge = pipeline, judge
        self.seed = rng.child(seed, "directions")

    def images(self, z: torch.Tensor, numbers: list[int]) -> dict[str, torch.Tensor]:
        """x_hat, and refined where the refiner draws pixels, (n, C, H, W) uint8, of latents z (n, *latent)."""
        z = z.to(self.pipeline.device)
        conditioning = Conditioning(self.pipeline.decode(z), z, self.pipeline.classes(None, len(z)))
        made = {"x_hat": to_uint8(conditioning.x_hat).cpu()}
        if not self.pipeline.models.latent_space:
            refined, _ = self.pipeline.refined(conditioning, Noise(self.seed, numbers))
            made["refined"] = to_uint8(refined)
        return made

    def look(self, z: torch.Tensor, numbers: list[int]) -> dict[str, torch.Tensor]:
        """The judged value of each attribute (n, A) of those images."""
        return {stage: self.judge(images) for stage, images in self.images(z, numbers).items()}

    def faces(self, images: torch.Tensor, truth: torch.Tensor, first: int) -> Faces:
        """Real images (n, C, H, W) uint8 with the codes of their labels, encoded; their noise is numbered from
        `first`."""
        z = self.pipeline.encode(images).z.cpu()
        numbers = list(range(first, first + len(images)))
        return Faces(z, truth, numbers, self.look(z, numbers))


def assess(settings: DirectionsConfig) -> direction_report.Report:
    """Train a judge on the run's training images, score its directions on held-out ones, write tables, JSON and
    picture.

    Raises UserError where there are no directions, no labels, or too few held-out images.
    """
    check(settings)
    pipeline = load(settings)
    if settings.sampler is not None:
        pipeline.use_sampler(settings.sampler)
    known = direction_files.load_all(settings.run)
    if not known:
        raise UserError(f"{settings.run} has no directions yet: add find=[labels,pca]")
    directions = [known[name] for name in chosen(settings.directions, list(known), "directions")]
    train_set, heldout_set = (
        open_split(settings.run, pipeline.config, split, settings.shards) for split in (TRAIN, HELDOUT)
    )
    enough(settings, heldout_set)
    attributes = Attributes.of(train_set)
    judge = judging.train(
        train_set,
        heldout_set,
        attributes,
        steps=settings.recognizer_steps,
        batch=settings.recognizer_batch,
        seed=settings.seed,
    )
    editor = Editor(pipeline, judge, settings.seed)
    images, truth = judging.pictured(heldout_set, attributes, settings.validation + settings.n)
    split = settings.validation
    validation = editor.faces(images[:split], truth[:split], 0)
    test = editor.faces(images[split:], truth[split:], split)
    scores = []
    with Progress("score", len(directions)) as progress:
        for direction in directions:
            targets = targets_of(direction, attributes)
            scores.append(score(direction, targets, editor.look, validation, test, settings.strengths, judge.told))
            progress.update(progress.step + 1)
    made = direction_report.Report(
        settings, judge, scores, test, pipeline.nfe, direction_files.encoder_hash(bundle.find_bundle(settings.run))
    )
    made.write(Path(settings.out))
    direction_report.strips(made, editor.images, Path(settings.out).with_suffix(".png"))
    return made


def check(settings: DirectionsConfig) -> None:
    """Raise UserError for settings that cannot be."""
    for name in ("validation", "n", "recognizer_steps", "recognizer_batch", "batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: use 1 or more")
    if not settings.strengths or min(settings.strengths) <= 0:
        raise UserError(f"strengths={settings.strengths}: give one or more above 0; pca and jacobian go both ways")
    if Path(settings.out).suffix != ".md":
        raise UserError(f"out={settings.out}: use a name that ends in .md")


def enough(settings: DirectionsConfig, heldout: Shards) -> None:
    """Raise UserError where there are fewer held-out images than are asked for."""
    if settings.validation + settings.n > len(heldout):
        raise UserError(
            f"validation={settings.validation} and n={settings.n} are more than the {len(heldout)} held-out images: "
            "use fewer"
        )


def targets_of(direction: Direction, attributes: Attributes) -> list[Target]:
    """What a direction is scored for: its own value, or whichever value it turns on best where it was found without
    labels.

    Raises UserError where the labels do not know its value.
    """
    if direction.method is not Method.labels:
        return [Target(i, value) for i, size in enumerate(attributes.sizes) for value in range(size)]
    if direction.value not in attributes.values.get(direction.attribute, []):
        raise UserError(
            f"direction {direction.name} is to {direction.attribute}={direction.value}, which the labels do not know: "
            "find it again from these shards"
        )
    attribute = attributes.names.index(direction.attribute)
    return [Target(attribute, attributes.values[direction.attribute].index(direction.value))]
