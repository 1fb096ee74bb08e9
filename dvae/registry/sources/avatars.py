"""Faces drawn by DiceBear: any number of images, with known attributes."""

from __future__ import annotations

import functools
import importlib.resources
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from PIL import Image

from dvae.data.images import decode
from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources.base import SOURCES, Item, Source
from dvae.utils.read import parse_json

# Colors that can be told apart at 32 pixels. DiceBear's own palettes are mostly shades of brown.
SKIN = ["#f6cfb2", "#e0a982", "#bd8058", "#8a5640"]
HAIR = ["#2c1b18", "#6b3f2a", "#e8c26a", "#d1512d", "#c9c9d2", "#4f7fd9", "#e0609a"]
OVERSAMPLING = 2  # faces are drawn at twice the size and scaled down, because eyes and mouths get sharper this way


class AvatarStyle(Enum):
    """DiceBear styles with a free license (CC BY 4.0 or CC0 1.0)."""

    toon_head = "toon-head"
    big_smile = "big-smile"
    personas = "personas"
    micah = "micah"
    adventurer = "adventurer"
    pixel_art = "pixel-art"
    open_peeps = "open-peeps"
    lorelei = "lorelei"
    notionists = "notionists"


# Framing, so that the face fills the image, and weights that prefer parts that can be told apart at 32 pixels.
OPTIONS: dict[AvatarStyle, dict[str, Any]] = {
    AvatarStyle.toon_head: {
        "scale": 1.42,
        "translateY": 6,
        "skinColor": SKIN,
        "hairColor": HAIR,
        "beardProbability": 15,
        "mouthVariant": {"laugh": 4, "agape": 3, "angry": 3, "smile": 1, "sad": 1},
        "eyesVariant": {"happy": 3, "wide": 3, "wink": 2, "humble": 1, "bow": 1},
    },
    AvatarStyle.big_smile: {"accessoriesProbability": 25},
    AvatarStyle.personas: {
        "scale": 1.5,
        "translateY": 10,
        "skinColor": SKIN,
        "hairColor": HAIR,
        "facialHairColor": HAIR[:2],
        "mouthVariant": ["bigSmile", "frown", "lips", "smile", "smirk", "surprise"],
    },
    AvatarStyle.micah: {"scale": 1.15},
    AvatarStyle.adventurer: {"scale": 1.15},
    AvatarStyle.open_peeps: {"scale": 1.1},
    AvatarStyle.lorelei: {"scale": 1.1},
    AvatarStyle.notionists: {"scale": 1.3, "translateY": 8},
}


@SOURCES.register("avatars")
class Avatars(Source):
    """Faces drawn by DiceBear. The labels are the parts and colors of each face."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        style: AvatarStyle = AvatarStyle.toon_head
        """DiceBear style. Each style is by a different artist."""
        n: int = 2000
        """Number of faces."""
        seed: int = 0
        """Seed of the faces. Different seeds give independent faces."""
        background: list[str] = field(default_factory=lambda: ["#f4a6a6", "#a6d8f4", "#b8e6b0", "#f6dd8a", "#c9b6f2"])
        """Colors of the background, as #rrggbb. Each face gets one of them."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if config.n < 1:
            raise UserError(f"source.n={config.n}: use 1 or more")
        wrong = [color for color in config.background if not re.fullmatch("#[0-9a-fA-F]{6}", color)]
        if wrong or not config.background:
            raise UserError(f"source.background={wrong or '[]'}: give one or more colors as #rrggbb")
        self.config, self.shapes = config, shapes
        self.protocol = f"drawn at {OVERSAMPLING}x, Pillow Lanczos"
        art = _definition(config.style.value)["meta"]["license"]["text"]
        self.license = f"{art}; drawn by DiceBear, with our colors and framing"

    def __len__(self) -> int:
        return self.config.n

    def __getitem__(self, index: int) -> Item:
        import resvg_py
        from dicebear import Avatar

        key = f"{self.config.seed}-{index}"
        options = {"seed": key, "backgroundColor": self.config.background, **OPTIONS.get(self.config.style, {})}
        drawn = Avatar(_style(self.config.style.value), options).to_json()
        size = self.shapes.image_size
        png = resvg_py.svg_to_bytes(
            svg_string=drawn["svg"], width=OVERSAMPLING * size, height=OVERSAMPLING * size, skip_system_fonts=True
        )
        image = decode(bytes(png), key).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        pixels = np.asarray(image.convert("L") if self.shapes.channels == 1 else image)
        labels = _labels(_definition(self.config.style.value), drawn["options"])
        return Item(key, pixels.reshape(size, size, self.shapes.channels), labels)


def _labels(definition: dict[str, Any], options: dict[str, Any]) -> dict[str, str | int]:
    """Return the variant and the color of each part that the style can draw; "none" if the part is absent."""
    labels: dict[str, str | int] = {part: options.get(f"{part}Variant", "none") for part in definition["components"]}
    for thing in ("background", *definition["colors"]):
        labels[f"{thing}_color"] = options.get(f"{thing}Color", ["none"])[0]
    return labels


@functools.cache
def _definition(style: str) -> dict[str, Any]:
    """Return DiceBear's definition of a style. Raises UserError if DiceBear is not installed."""
    try:
        import dicebear  # noqa: F401
        import resvg_py  # noqa: F401

        text = (importlib.resources.files("dicebear_styles") / f"{style}.json").read_text("utf-8")
    except ModuleNotFoundError as error:
        raise UserError(
            f"source=avatars needs {error.name}: pip install dicebear-core dicebear-styles resvg-py"
        ) from None
    definition: dict[str, Any] = parse_json(text, f"{style}.json")
    return definition


@functools.cache
def _style(style: str) -> Any:
    from dicebear import Style

    return Style(_definition(style))
