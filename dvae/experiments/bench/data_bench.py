"""Compare the loading speed of dvae's shards and loader, ImageFolder, and plain webdataset on the same images."""

from __future__ import annotations

import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import webdataset
from hydra.core.config_store import ConfigStore
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import ToTensor

from dvae.data.image_tree import FolderTree
from dvae.data.images import Crop, DamagedImage, decode, encode_png, fit, open_image
from dvae.data.loading.loader import Loader
from dvae.data.loading.order import Order
from dvae.data.shards.manifest import FILE, HELDOUT, TRAIN, Manifest
from dvae.data.shards.reader import Shards
from dvae.data.shards.tar_files import ShardWriter, seal
from dvae.errors import UserError
from dvae.utils import atomic_files
from dvae.utils.text_tables import markdown_table

BASE = "ImageFolder, JPEG"
"""Name of the baseline that the others are compared with."""
SHARD_SIZE = 1000
"""Images in each shard."""


@dataclass(kw_only=True, slots=True)
class DataBenchConfig:
    """Settings of `tools/bench.py data`."""

    folder: str = ""
    """Folder of images. Empty: smooth noise is generated."""
    size: int = 256
    """Height and width of the images in pixels."""
    n: int = 1000
    """Maximum number of images."""
    batch: int = 64
    """Images per batch. At most the number of images."""
    threads: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Numbers of threads of dvae's loader, and of worker processes of ImageFolder's. 0: none."""
    rounds: int = 3
    """Passes over the images for each loader. All loaders alternate, and the median is reported."""
    quality: int = 90
    """Quality of the JPEG files, as in Pillow."""
    out: str = ""
    """JSON file for the figures. Empty: none is written."""


ConfigStore.instance().store(name="bench_data_schema", node=DataBenchConfig, provider="dvae")


def run(config: DataBenchConfig) -> dict[str, dict[str, float]]:
    """Measure all loaders and decoders with one torch thread.

    Returns {"loaders": {...}, "decoders": {...}} with the images per second by name. Raises UserError for invalid
    settings.
    """
    for name in ("size", "n", "batch", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)}: use 1 or more")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation warnings of webdataset and torchvision
            count = prepare(Path(folder), config)
            if count < config.batch:
                raise UserError(f"{count} images are too few for a batch of {config.batch}: use a smaller batch")
            figures = {
                "loaders": timed(loaders(Path(folder), config), config.rounds),
                "decoders": timed(decoders(Path(folder)), config.rounds),
            }
    finally:
        torch.set_num_threads(threads)
    if config.out:
        atomic_files.write_json(Path(config.out), figures)
    return figures


def pictures(config: DataBenchConfig) -> Iterator[np.ndarray]:
    """Yield images (size, size, 3), uint8, from the folder, or smooth noise.

    JPEG compresses this noise about as well as a photograph.
    """
    if config.folder:
        tree = FolderTree(config.folder, "folder")
        for name in tree.names[: config.n]:
            try:
                yield fit(decode(tree.read(name), name), config.size, 3, Crop.center, name)
            except DamagedImage as error:
                raise UserError(f"folder={config.folder}: {error}") from None
        return
    for number in range(config.n):
        coarse = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        yield np.asarray(Image.fromarray(coarse).resize((config.size, config.size), Image.Resampling.BICUBIC))


def prepare(folder: Path, config: DataBenchConfig) -> int:
    """Write the same images as JPEG files (jpeg/all/), as a tar file of them (jpeg.tar), and as shards (shards/).

    The shards hold the decoded JPEG images as PNG. Returns the number of images.
    """
    (folder / "jpeg" / "all").mkdir(parents=True)
    (folder / "shards").mkdir()
    jpegs, shards, count = ShardWriter(folder / "jpeg.tar"), [], 0
    writer: ShardWriter | None = None
    for count, pixels in enumerate(pictures(config), start=1):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=config.quality)
        data = file.getvalue()
        (folder / "jpeg" / "all" / f"{count:06d}.jpg").write_bytes(data)
        about = json.dumps({"key": str(count), "labels": {}}).encode()
        jpegs.write(count, {"jpg": data})
        if writer is None:
            writer = ShardWriter(folder / "shards" / f"train-{count // SHARD_SIZE:06d}.tar")
        writer.write(count, {"png": encode_png(np.asarray(decode(data, "jpeg"))), "json": about})
        if count % SHARD_SIZE == 0:
            writer.close()
            shards.append(seal(writer.path))
            writer = None
    jpegs.close()
    if writer is not None:
        writer.close()
        shards.append(seal(writer.path))
    manifest = Manifest(
        image_size=config.size, channels=3, source={}, license="", protocol="", heldout_fraction=0.0,
        shard_size=SHARD_SIZE, splits={TRAIN: shards, HELDOUT: []}, labels={},
    )  # fmt: skip
    atomic_files.write_json(folder / "shards" / FILE, manifest.as_dict())
    return count


Way = Callable[[], int]
"""Passes once over the images and returns how many it has read."""


def loaders(folder: Path, config: DataBenchConfig) -> dict[str, Way]:
    """Return all loaders by name. They load batches (B, 3, H, W) of uint8 or float."""
    fresh, kept = Shards(folder / "shards", cache_bytes=0), Shards(folder / "shards", cache_bytes=2**40)
    kept.read(range(len(kept)))
    ways: dict[str, Way] = {
        f"ours, {threads} threads": partial(ours, fresh, threads, config) for threads in config.threads
    }
    ways["ours, from memory"] = partial(ours, kept, 0, config)
    for workers in config.threads:
        name = BASE if workers == 0 else f"{BASE}, {workers} workers"
        ways[name] = partial(image_folder, folder / "jpeg", workers, config)
    for decoder in ("pil", "torchrgb"):
        for kind, pattern in (("JPEG", "jpeg.tar"), ("PNG", "shards/train-*.tar")):
            tars = sorted(map(str, folder.glob(pattern)))
            ways[f"webdataset {decoder}, {kind}"] = partial(webdataset_of, tars, decoder, config)
    return ways


def ours(shards: Shards, threads: int, config: DataBenchConfig) -> int:
    """Load the shards with the order, reader, decoder and loader of a training run."""
    seen = 0
    with Loader(shards, Order(len(shards)), config.batch, threads=threads) as loader:
        while seen + config.batch <= len(shards):
            (batch,) = loader.step(seen)
            seen += len(batch.images)
    return seen


def image_folder(folder: Path, workers: int, config: DataBenchConfig) -> int:
    """Load the JPEG files with ImageFolder, PIL and ToTensor."""
    data = ImageFolder(str(folder), ToTensor())
    loader = DataLoader(data, config.batch, shuffle=True, num_workers=workers, drop_last=True)
    return sum(len(images) for images, _ in loader)


def webdataset_of(tars: list[str], decoder: str, config: DataBenchConfig) -> int:
    """Load the tar files with a plain WebDataset. With the decoder "pil", images are converted to uint8 tensors."""
    data = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).shuffle(1000).decode(decoder)
    data = data.to_tuple("jpg;png")
    if decoder == "pil":
        data = data.map_tuple(lambda image: torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    return sum(len(images) for (images,) in data.batched(config.batch, partial=False))


def decoders(folder: Path) -> dict[str, Way]:
    """Return all decoders by name. Each decodes bytes in memory to (3, H, W) uint8, in one thread."""
    jpegs = [path.read_bytes() for path in sorted((folder / "jpeg" / "all").iterdir())[:200]]
    pngs = [encode_png(np.asarray(decode(data, "jpeg"))) for data in jpegs]

    def by_torchvision(data: bytes) -> torch.Tensor:
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)

    def by_pillow(data: bytes) -> torch.Tensor:
        return torch.from_numpy(np.array(open_image(data, "image").convert("RGB"))).permute(2, 0, 1)

    def over(decoder: Callable[[bytes], torch.Tensor], encoded: list[bytes]) -> Way:
        return lambda: sum(1 for data in encoded if decoder(data).shape[0] == 3)

    return {
        "torchvision, PNG": over(by_torchvision, pngs),
        "Pillow, PNG": over(by_pillow, pngs),
        "torchvision, JPEG": over(by_torchvision, jpegs),
        "Pillow, JPEG": over(by_pillow, jpegs),
    }


def timed(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    """Return the images per second by name: the median over the rounds.

    All functions alternate in each round, so that other load on the machine affects them equally.
    """
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            seen = way()
            speeds[name].append(seen / (time.perf_counter() - began))
    return {name: median(found) for name, found in speeds.items()}


def table(figures: dict[str, dict[str, float]]) -> str:
    """Return the figures as two Markdown tables.

    The table of loaders also has each speed relative to ImageFolder without workers, or with the first number of
    workers.
    """
    loading = figures["loaders"]
    base = loading.get(BASE) or next(speed for name, speed in loading.items() if name.startswith(BASE))
    loaders = [[name, f"{speed:.0f}", f"{speed / base:.2f}"] for name, speed in loading.items()]
    decoders = [[name, f"{1000 / speed:.2f}"] for name, speed in figures["decoders"].items()]
    return "\n\n".join(
        [
            markdown_table(["loader", "images/s", "ratio"], loaders),
            markdown_table(["decoder", "ms per image"], decoders),
        ]
    )
