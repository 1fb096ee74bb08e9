"""Score the directions of a run on held-out images (tools/directions.py score=true)."""

from __future__ import annotations

from pathlib import Path

import torch

from dvae.data.images import to_uint8
from dvae.data.shards.manifest import HELDOUT, TRAIN
from dvae.data.shards.reader import Shards
from dvae.diffusion.conditioning import Conditioning
from dvae.errors import UserError
from dvae.evaluation.directions import direction_report
from dvae.evaluation.directions.attribute_recognizer import AttributeRecognizer, train_attribute_recognizer
from dvae.evaluation.directions.direction_scores import HeldoutFaces, TargetValue, score_direction
from dvae.inference.directions import direction_files
from dvae.inference.directions.attributes import LabeledAttributes, labeled_images
from dvae.inference.directions.direction import Direction, DirectionMethod
from dvae.inference.directions.direction_settings import DirectionsConfig
from dvae.inference.directions.find_directions import load_with_encoder, select_names
from dvae.inference.noise import KeyedNoise
from dvae.inference.pipeline import Pipeline
from dvae.inference.refine import refine_images
from dvae.inference.run_images import open_split
from dvae.models import bundle
from dvae.tracking.console import Progress
from dvae.utils import rng


class FaceEditor:
    """Draws images of latents, and recognizes their attributes.

    The noise of face k is the noise of image k of the seed. So an edited face and the same face at strength 0 differ by
    the edit only.
    """

    def __init__(self, pipeline: Pipeline, recognizer: AttributeRecognizer, seed: int) -> None:
        self.pipeline, self.recognizer = pipeline, recognizer
        self.seed = rng.child(seed, "directions")

    def images(self, z: torch.Tensor, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Draw images of latents z (n, *latent), with noise of the given numbers.

        Returns images (n, C, H, W) uint8 by stage: "x_hat" and, if the refiner draws pixels, "refined".
        """
        z = z.to(self.pipeline.device)
        conditioning = Conditioning(self.pipeline.decode(z), z, self.pipeline.class_numbers(None, len(z)))
        images = {"x_hat": to_uint8(conditioning.x_hat).cpu()}
        if not self.pipeline.models.latent_space:
            refined, _ = refine_images(self.pipeline, conditioning, KeyedNoise(self.seed, numbers))
            images["refined"] = to_uint8(refined)
        return images

    def recognize(self, z: torch.Tensor, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Recognize the attributes (n, A) int64 in the images that `images` draws, by stage."""
        return {stage: self.recognizer(images) for stage, images in self.images(z, numbers).items()}

    def faces(self, images: torch.Tensor, truth: torch.Tensor, first: int) -> HeldoutFaces:
        """Encode real images (n, C, H, W) uint8 with the codes of their labels `truth` (n, A).

        Their noise is numbered from `first`.
        """
        z = self.pipeline.encode(images).z.cpu()
        numbers = list(range(first, first + len(images)))
        return HeldoutFaces(z, truth, numbers, self.recognize(z, numbers))


def evaluate_directions(settings: DirectionsConfig) -> direction_report.DirectionReport:
    """Train a recognizer on the run's training images, and score the run's directions on held-out images.

    Writes tables (settings.out), a JSON file and a picture. Raises UserError if the settings are invalid, or if there
    are no directions, no labels or too few held-out images.
    """
    check(settings)
    pipeline = load_with_encoder(settings)
    if settings.sampler is not None:
        pipeline.use_sampler(settings.sampler)
    known = direction_files.load_all(settings.run)
    if not known:
        raise UserError(f"{settings.run} has no directions yet: add find=[labels,pca]")
    directions = [known[name] for name in select_names(settings.directions, list(known), "directions")]
    train_set, heldout_set = (
        open_split(settings.run, pipeline.config, split, settings.shards) for split in (TRAIN, HELDOUT)
    )
    check_heldout(settings, heldout_set)
    attributes = LabeledAttributes.from_shards(train_set)
    recognizer = train_attribute_recognizer(
        train_set,
        heldout_set,
        attributes,
        steps=settings.recognizer_steps,
        batch=settings.recognizer_batch,
        seed=settings.seed,
    )  # fmt: skip
    editor = FaceEditor(pipeline, recognizer, settings.seed)
    images, truth = labeled_images(heldout_set, attributes, settings.validation + settings.n)
    split = settings.validation
    validation = editor.faces(images[:split], truth[:split], 0)
    test = editor.faces(images[split:], truth[split:], split)
    scores = []
    with Progress("score", len(directions)) as progress:
        for direction in directions:
            targets = direction_targets(direction, attributes)
            scores.append(
                score_direction(
                    direction, targets, editor.recognize, validation, test, settings.strengths, recognizer.recognizable
                )
            )
            progress.update(progress.step + 1)
    report = direction_report.DirectionReport(
        settings, recognizer, scores, test, pipeline.nfe, direction_files.encoder_hash(bundle.find_bundle(settings.run))
    )
    report.write(Path(settings.out))
    direction_report.write_strips(report, editor.images, Path(settings.out).with_suffix(".png"))
    return report


def check(settings: DirectionsConfig) -> None:
    """Raise UserError if a setting is out of range."""
    for name in ("validation", "n", "recognizer_steps", "recognizer_batch", "batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: use 1 or more")
    if not settings.strengths or min(settings.strengths) <= 0:
        raise UserError(f"strengths={settings.strengths}: give one or more above 0; pca and jacobian go both ways")
    if Path(settings.out).suffix != ".md":
        raise UserError(f"out={settings.out}: use a name that ends in .md")


def check_heldout(settings: DirectionsConfig, heldout: Shards) -> None:
    """Raise UserError if there are fewer held-out images than the settings ask for."""
    if settings.validation + settings.n > len(heldout):
        raise UserError(
            f"validation={settings.validation} and n={settings.n} are more than the {len(heldout)} held-out images: "
            "use fewer"
        )


def direction_targets(direction: Direction, attributes: LabeledAttributes) -> list[TargetValue]:
    """The values that a direction may be scored for.

    A direction that was found from labels has one value. For another direction these are all values of all attributes,
    and `score_direction` chooses the best. Raises UserError if the labels do not have the value of the direction.
    """
    if direction.method is not DirectionMethod.labels:
        return [TargetValue(i, value) for i, size in enumerate(attributes.sizes) for value in range(size)]
    if direction.value not in attributes.values.get(direction.attribute, []):
        raise UserError(
            f"direction {direction.name} is for {direction.attribute}={direction.value}, which is not in the labels: "
            "find it again from these shards"
        )
    attribute = attributes.names.index(direction.attribute)
    return [TargetValue(attribute, attributes.values[direction.attribute].index(direction.value))]
