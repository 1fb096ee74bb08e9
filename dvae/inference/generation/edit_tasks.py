"""Artists that begin with images: reconstructed, interpolated, edited, inpainted."""

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
    GivenConfig,
    InpaintConfig,
    InterpolateConfig,
    ReconstructConfig,
)
from dvae.inference.generation.input_images import DRAWN, HELDOUT, Inputs, open_inputs
from dvae.inference.generation.task import DEFAULT_COUNT, GenerationTask, side_by_side
from dvae.utils.read import DamagedFile, read_bytes

GRAY = 128
"""What stands for a pixel that is not known, and from which on a mask's pixel means known."""


class EditTask(GenerationTask):
    """Results of one or more given images each: result k of the images k * per, k * per + 1, ..."""

    decide: ClassVar[tuple[str, ...]] = ("resize",)
    settings: GivenConfig
    per = 1

    def __init__(self, settings: GivenConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        self.inputs: Inputs | None = None
        if settings.images == DRAWN:
            self.total = self.asked.stop
            if settings.original:
                raise UserError("original=true: drawn images are themselves results: use original=false")
        else:
            self.inputs = open_inputs(settings, self.pipeline.config)
            self.total = len(self.inputs) // self.per
            what = f"images={settings.images} makes" if self.per > 1 else f"images={settings.images} holds"
            self.limit(self.total, what, DEFAULT_COUNT if settings.images == HELDOUT else None)
        shown = self.picture if settings.original is None else settings.original
        self.original = shown and self.inputs is not None

    def request(self) -> dict[str, Any]:
        if self.inputs is not None:
            self.inputs.check(range(self.asked.start * self.per, self.asked.stop * self.per))
        images = DRAWN if self.inputs is None else self.inputs.identity
        return super().request() | {"images": images, "original": self.original}

    def there(self, numbers: range) -> range:
        """Those results of a fixed chunk that there are."""
        return numbers if self.inputs is None else range(numbers.start, min(numbers.stop, self.total))

    def classes(self, images: range) -> list[int | str]:
        """The class of each: the one asked for, or its own; -1 where it is not known."""
        if self.settings.label or self.inputs is None or not self.labeled:
            return [self.settings.label or -1] * len(images)
        own = [self.inputs.label(number) for number in images]
        return [-1 if name is None else name for name in own]

    def start(self, images: range) -> editing.Start:
        """z and noise of the images of these numbers."""
        label = self.settings.label or None
        if self.inputs is None:
            return editing.start(self.pipeline, list(images), self.settings.seed, label)
        given = self.inputs.read(images)
        return editing.start(self.pipeline, given, self.settings.seed, self.classes(images), images)

    def arrays(
        self, drawn: GeneratedImages, left: list[torch.Tensor], right: list[torch.Tensor]
    ) -> dict[str, np.ndarray]:
        """What `draw` returns, of the images (n * images, ...): the VAE's above the refined where there are several."""
        n, size = len(drawn.refined) // self.images, (-1, self.images)
        refined = list(drawn.refined.unflatten(0, size).unbind(1))
        before = list(drawn.vae.unflatten(0, size).unbind(1)) if drawn.vae is not None and self.vae else []
        if self.tiles[0] > 1:
            pixels = side_by_side([[*left, *before, *right], [*left, *refined, *right]])
        else:
            pixels = side_by_side([[*left, *before, *refined, *right]])
        arrays = {"pixels": pixels, "nfe": drawn.nfe.view(n, self.images).numpy()}
        return arrays if drawn.label is None else arrays | {"label": drawn.label.view(n, -1)[:, 0].numpy()}


class Reconstructions(EditTask):
    """[the image] [the VAE's reconstruction] the refined one."""

    settings: ReconstructConfig

    def __init__(self, settings: ReconstructConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        if self.inputs is None:
            raise UserError("images=drawn: what is drawn needs no reconstruction: use tools/sample.py")
        self.tiles = (1, self.original + self.vae + 1)

    def draw(self, numbers: range) -> dict[str, np.ndarray]:
        images = self.there(numbers)
        drawn = editing.reconstruct(self.pipeline, self.start(images), self.settings.seed, self.guidance)
        assert self.inputs is not None
        return self.arrays(drawn, [self.inputs.read(images)] if self.original else [], [])


class Interpolations(EditTask):
    """Strips from image 2 k to image 2 k + 1, [with the images at their sides]."""

    decide = ("resize", "space", "steps")
    settings: InterpolateConfig
    per = 2

    def __init__(self, settings: InterpolateConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        if settings.steps < 2:
            raise UserError(f"steps={settings.steps}: use 2 or more, both ends are among them")
        self.images = settings.steps
        self.tiles = (1 + self.vae, self.images + 2 * self.original)

    def draw(self, numbers: range) -> dict[str, np.ndarray]:
        settings, pairs = self.settings, self.there(numbers)
        ends = [range(2 * pairs.start + side, 2 * pairs.stop, 2) for side in (0, 1)]
        a, b = (self.start(end) for end in ends)
        drawn = editing.interpolate(self.pipeline, a, b, settings.space, settings.steps, settings.seed, self.guidance)
        left, right = ([self.inputs.read(end)] if self.original and self.inputs else [] for end in ends)
        return self.arrays(drawn, left, right)


class Edits(EditTask):
    """[the image] then it at each strength."""

    decide = ("resize", "direction", "strength", "strengths")
    settings: EditConfig

    def __init__(self, settings: EditConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        self.direction = directions.load(settings.run, settings.direction)
        self.move = editing.along(self.pipeline, self.direction)
        self.strengths = settings.strengths if settings.strength is None else [settings.strength]
        if not self.strengths:
            raise UserError("strengths=[]: name one or more, such as strengths=[-2,0,2]")
        self.images = len(self.strengths)
        rows, columns = (1 + self.vae, self.images) if self.images > 1 else (1, self.vae + 1)
        self.tiles = (rows, self.original + columns)

    def request(self) -> dict[str, Any]:
        return super().request() | {"moves": self.direction.fingerprint()}

    def draw(self, numbers: range) -> dict[str, np.ndarray]:
        images, settings = self.there(numbers), self.settings
        drawn = editing.edit(self.pipeline, self.start(images), self.move, self.strengths, settings.seed, self.guidance)
        return self.arrays(drawn, [self.inputs.read(images)] if self.original and self.inputs else [], [])


class Inpaintings(EditTask):
    """[the image, what is known of it] [the VAE's image] the inpainted one."""

    decide = ("resize", "mask")
    settings: InpaintConfig

    def __init__(self, settings: InpaintConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        if self.inputs is None:
            raise UserError("images=drawn: draw them with tools/sample.py out=NAME/ first, then name images=NAME/")
        self.mask = read_mask(settings.mask, self.pipeline.config.image_size)
        self.tiles = (1, 2 * self.original + self.vae + 1)

    def request(self) -> dict[str, Any]:
        return super().request() | {"known": editing.fingerprint(self.mask)}

    def draw(self, numbers: range) -> dict[str, np.ndarray]:
        assert self.inputs is not None
        images, settings = self.there(numbers), self.settings
        given = self.inputs.read(images)
        masks = self.mask.expand(len(given), 1, *self.mask.shape)
        drawn = inpainting.inpaint(
            self.pipeline, given, masks, settings.seed, images, self.classes(images), self.guidance
        )
        known = torch.where(masks, given, torch.tensor(GRAY, dtype=torch.uint8))
        return self.arrays(drawn, [given, known] if self.original else [], [])


def read_mask(word: str, size: int) -> torch.Tensor:
    """The mask (size, size), true where pixels are known: of a name, or of a picture that is white there.

    Raises UserError for a picture of another size, and where all or nothing is known.
    """
    path = Path(word).expanduser()
    if not path.is_file() and (word in inpainting.KNOWN or not path.exists()):
        return inpainting.mask_of(word, size)
    try:
        picture = decode(read_bytes(path, FILE_LIMIT), word).convert("L")
    except DamagedImage as error:
        raise UserError(f"mask={error}") from None
    except DamagedFile as error:
        raise UserError(f"mask={error}: name a PNG") from None
    if picture.size != (size, size):
        raise UserError(f"mask={word} is {picture.size[0]}x{picture.size[1]}, the run's images are {size}x{size}")
    mask = torch.from_numpy(np.asarray(picture) >= GRAY)
    if mask.all() or not mask.any():
        raise UserError(f"mask={word} is all {'white' if mask.all() else 'black'}: white is known, black drawn anew")
    return mask
