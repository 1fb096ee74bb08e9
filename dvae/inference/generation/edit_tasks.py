"""Generation tasks that start from images: reconstruct, interpolate, edit, inpaint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dvae.data.images import FILE_LIMIT, DamagedImage, decode
from dvae.errors import UserError
from dvae.inference import directions, editing, inpainting
from dvae.inference.batching import GeneratedImages
from dvae.inference.generation.generation_settings import (
    EditConfig,
    ImageInputConfig,
    InpaintConfig,
    InterpolateConfig,
    ReconstructConfig,
)
from dvae.inference.generation.input_images import DRAWN, HELDOUT, InputImages, open_input_images
from dvae.inference.generation.task import DEFAULT_COUNT, GenerationTask, side_by_side
from dvae.utils.read import DamagedFile, read_bytes

UNKNOWN_PIXEL = 128
"""Gray value that shows an unknown pixel in a picture."""
MASK_THRESHOLD = 128
"""Smallest gray value of a mask pixel that means known."""


class ImageInputTask(GenerationTask):
    """A task whose results start from images.

    With p = inputs_per_result, result k starts from the images k p, ..., k p + p - 1.
    """

    identity_fields: ClassVar[tuple[str, ...]] = ("resize",)
    settings: ImageInputConfig
    inputs_per_result = 1

    def __init__(self, settings: ImageInputConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        self.inputs: InputImages | None = None
        if settings.images == DRAWN:
            self.total = self.requested.stop
            if settings.original:
                raise UserError("original=true: drawn images are themselves results: use original=false")
        else:
            self.inputs = open_input_images(settings, self.pipeline.config)
            self.total = len(self.inputs) // self.inputs_per_result
            subject = (
                f"images={settings.images} makes" if self.inputs_per_result > 1 else f"images={settings.images} holds"
            )
            self.limit_results(self.total, subject, DEFAULT_COUNT if settings.images == HELDOUT else None)
        original = self.is_picture if settings.original is None else settings.original
        self.original = original and self.inputs is not None

    def request(self) -> dict[str, Any]:
        if self.inputs is not None:
            self.inputs.check(
                range(self.requested.start * self.inputs_per_result, self.requested.stop * self.inputs_per_result)
            )
        images = DRAWN if self.inputs is None else self.inputs.identity
        return super().request() | {"images": images, "original": self.original}

    def existing(self, numbers: range) -> range:
        """Return the results of a fixed chunk that exist. The last chunk may go beyond the last input image."""
        return numbers if self.inputs is None else range(numbers.start, min(numbers.stop, self.total))

    def labels(self, numbers: range) -> list[int | str]:
        """Return the class of each image: the requested class, else the image's own class, else -1 (unknown)."""
        if self.settings.label or self.inputs is None or not self.labeled:
            return [self.settings.label or -1] * len(numbers)
        own = [self.inputs.label(number) for number in numbers]
        return [-1 if name is None else name for name in own]

    def source_images(self, numbers: range) -> editing.SourceImages:
        """Return z and noise of the images with these numbers."""
        label = self.settings.label or None
        if self.inputs is None:
            return editing.source_images(self.pipeline, list(numbers), self.settings.seed, label)
        images = self.inputs.read(numbers)
        return editing.source_images(self.pipeline, images, self.settings.seed, self.labels(numbers), numbers)

    def to_arrays(
        self, generated: GeneratedImages, left: list[torch.Tensor], right: list[torch.Tensor]
    ) -> dict[str, np.ndarray]:
        """Convert generated images, (n * images_per_result, ...), to the arrays that `generate` returns.

        `left` and `right` hold images (n, C, H, W) for the sides of a result. If `tiles` has two rows, the VAE's images
        are in the upper row and the refined images in the lower row.
        """
        n, size = len(generated.refined) // self.images_per_result, (-1, self.images_per_result)
        refined = list(generated.refined.unflatten(0, size).unbind(1))
        vae = list(generated.vae.unflatten(0, size).unbind(1)) if generated.vae is not None and self.vae else []
        if self.tiles[0] > 1:
            pixels = side_by_side([[*left, *vae, *right], [*left, *refined, *right]])
        else:
            pixels = side_by_side([[*left, *vae, *refined, *right]])
        arrays = {"pixels": pixels, "nfe": generated.nfe.view(n, self.images_per_result).numpy()}
        return arrays if generated.label is None else arrays | {"label": generated.label.view(n, -1)[:, 0].numpy()}


class ReconstructTask(ImageInputTask):
    """Reconstruct images.

    Tiles: the input image (if `original`), the VAE's reconstruction (if `vae`), the refined reconstruction.
    """

    settings: ReconstructConfig

    def __init__(self, settings: ReconstructConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        if self.inputs is None:
            raise UserError("images=drawn: generated images need no reconstruction: use tools/sample.py")
        self.tiles = (1, self.original + self.vae + 1)

    def generate(self, numbers: range) -> dict[str, np.ndarray]:
        images = self.existing(numbers)
        generated = editing.reconstruct(self.pipeline, self.source_images(images), self.settings.seed, self.guidance)
        assert self.inputs is not None
        return self.to_arrays(generated, [self.inputs.read(images)] if self.original else [], [])


class InterpolateTask(ImageInputTask):
    """Generate strips from image 2 k to image 2 k + 1, with the two input images at the sides if `original` is set."""

    identity_fields = ("resize", "space", "steps")
    settings: InterpolateConfig
    inputs_per_result = 2

    def __init__(self, settings: InterpolateConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        if settings.steps < 2:
            raise UserError(f"steps={settings.steps}: use 2 or more, both ends are among them")
        self.images_per_result = settings.steps
        self.tiles = (1 + self.vae, self.images_per_result + 2 * self.original)

    def generate(self, numbers: range) -> dict[str, np.ndarray]:
        settings, pairs = self.settings, self.existing(numbers)
        ends = [range(2 * pairs.start + side, 2 * pairs.stop, 2) for side in (0, 1)]
        a, b = (self.source_images(end) for end in ends)
        generated = editing.interpolate(
            self.pipeline, a, b, settings.space, settings.steps, settings.seed, self.guidance
        )
        left, right = ([self.inputs.read(end)] if self.original and self.inputs else [] for end in ends)
        return self.to_arrays(generated, left, right)


class EditTask(ImageInputTask):
    """Edit images along a direction. Tiles: the input image (if `original`), then one image for each strength."""

    identity_fields = ("resize", "direction", "strength", "strengths")
    settings: EditConfig

    def __init__(self, settings: EditConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        self.direction = directions.load(settings.run, settings.direction)
        self.latent_edit = editing.latent_edit(self.pipeline, self.direction)
        self.strengths = settings.strengths if settings.strength is None else [settings.strength]
        if not self.strengths:
            raise UserError("strengths=[]: name one or more, such as strengths=[-2,0,2]")
        self.images_per_result = len(self.strengths)
        rows, columns = (1 + self.vae, self.images_per_result) if self.images_per_result > 1 else (1, self.vae + 1)
        self.tiles = (rows, self.original + columns)

    def request(self) -> dict[str, Any]:
        return super().request() | {"moves": self.direction.fingerprint()}

    def generate(self, numbers: range) -> dict[str, np.ndarray]:
        images, settings = self.existing(numbers), self.settings
        generated = editing.edit(
            self.pipeline, self.source_images(images), self.latent_edit, self.strengths, settings.seed, self.guidance
        )
        return self.to_arrays(generated, [self.inputs.read(images)] if self.original and self.inputs else [], [])


class InpaintTask(ImageInputTask):
    """Inpaint images.

    Tiles: the input image and its known pixels (if `original`), the VAE's image (if `vae`), the inpainted image.
    """

    identity_fields = ("resize", "mask")
    settings: InpaintConfig

    def __init__(self, settings: InpaintConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        if self.inputs is None:
            raise UserError("images=drawn: draw them with tools/sample.py out=NAME/ first, then name images=NAME/")
        self.mask = read_mask(settings.mask, self.pipeline.config.image_size)
        self.tiles = (1, 2 * self.original + self.vae + 1)

    def request(self) -> dict[str, Any]:
        return super().request() | {"known": editing.fingerprint(self.mask)}

    def generate(self, numbers: range) -> dict[str, np.ndarray]:
        assert self.inputs is not None
        images, settings = self.existing(numbers), self.settings
        given = self.inputs.read(images)
        masks = self.mask.expand(len(given), 1, *self.mask.shape)
        generated = inpainting.inpaint(
            self.pipeline, given, masks, settings.seed, images, self.labels(images), self.guidance
        )
        known = torch.where(masks, given, torch.tensor(UNKNOWN_PIXEL, dtype=torch.uint8))
        return self.to_arrays(generated, [given, known] if self.original else [], [])


def read_mask(word: str, size: int) -> torch.Tensor:
    """Return the mask (size, size), bool, true at known pixels.

    `word` is a name of `NAMED_MASKS` or the path of a picture that is white at known pixels. A file takes precedence
    over a name, a name over a folder.

    Raises UserError if the picture has another size, or if all pixels or no pixels are known.
    """
    path = Path(word).expanduser()
    if not path.is_file() and (word in inpainting.NAMED_MASKS or not path.exists()):
        return inpainting.named_mask(word, size)
    try:
        picture = decode(read_bytes(path, FILE_LIMIT), word).convert("L")
    except DamagedImage as error:
        raise UserError(f"mask={error}") from None
    except DamagedFile as error:
        raise UserError(f"mask={error}: name a PNG") from None
    if picture.size != (size, size):
        raise UserError(f"mask={word} is {picture.size[0]}x{picture.size[1]}, the run's images are {size}x{size}")
    mask = torch.from_numpy(np.asarray(picture) >= MASK_THRESHOLD)
    if mask.all() or not mask.any():
        raise UserError(f"mask={word} is all {'white' if mask.all() else 'black'}: white is known, black drawn anew")
    return mask
