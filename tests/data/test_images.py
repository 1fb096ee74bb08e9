"""Decoding, the resize protocol, and the conversion between uint8 and floats."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dvae.data.images import Crop, DamagedImage, decode, encode_png, fit, is_image_name, to_float, to_uint8


def test_every_byte_survives_the_round_trip_through_floats():
    every = torch.arange(256, dtype=torch.uint8)
    floats = to_float(every)
    assert floats.dtype == torch.float32
    assert (floats[0].item(), floats[255].item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(floats), every)


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-3.0, -1.0, to_float(torch.tensor(7, dtype=torch.uint8)).item() + 0.0035, 1.0, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 7, 255, 255]  # 0.0035 is less than half a step


def test_center_crop_takes_the_middle_square():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (fit(Image.fromarray(pixels), 10, 3, Crop.center, "x") == 200).all()


def test_no_crop_squeezes_the_whole_image():
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    squeezed = fit(Image.fromarray(pixels), 8, 3, Crop.none, "x")
    assert squeezed[:, 0].max() < 30
    assert squeezed[:, -1].min() > 225


def test_downsampling_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(fit(Image.fromarray(stripes), 8, 3, Crop.center, "x").astype(int) - 127).max() <= 8  # borders


def test_an_image_of_the_right_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(fit(Image.fromarray(pixels), 16, 3, Crop.center, "x"), pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode: str):
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0)).convert(mode)
    if mode == "P":
        clear.info["transparency"] = 0
    assert (fit(clear, 8, 3, Crop.center, "x") == 255).all()


def test_gray_16_bit_is_scaled_to_8():
    deep = Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16))
    assert set(fit(deep, 8, 1, Crop.center, "x").ravel().tolist()) <= {127, 128}


def test_floats_without_a_range_are_refused():
    with pytest.raises(DamagedImage, match="mode F"):
        fit(Image.fromarray(np.zeros((8, 8), np.float32)), 8, 3, Crop.center, "x.tif")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_decode_reads_the_usual_formats(kind: str):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (250, 0, 0)).save(buffer, kind)
    assert decode(buffer.getvalue(), "x").size == (9, 7)


def test_decode_turns_a_photograph_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue(), "x").size == (10, 20)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"hello", lambda b: b[: len(b) // 2], lambda b: b[:30]])
def test_damage_is_named(damage):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with pytest.raises(DamagedImage, match=r"^a/b\.png: "):
        decode(damage(encode_png(noise)), "a/b.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels: int):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, channels), dtype=np.uint8)
    back = fit(decode(encode_png(pixels), "x"), 12, channels, Crop.none, "x")
    assert np.array_equal(back, pixels)


def test_image_names():
    assert is_image_name("a/B.JPG")
    assert not is_image_name("a/._b.jpg")  # resource fork of a Mac
    assert not is_image_name("notes.txt")
