"""A run's cache in parts: the same bytes as at once, by the real encoder, through the job and the tool."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dvae.config import compose as config
from dvae.data.building import cache_build
from dvae.errors import UserError
from dvae.models import components
from dvae.registry.stages.base import with_settings
from dvae.runs.folder import Run, submit
from dvae.stages import cache
from dvae.stages.cache import CacheStage
from dvae.stages.run_models import load_models
from dvae.stages.shards import ShardsStage
from dvae.tools import cache as cache_tool
from dvae.training.batches import open_shards
from dvae.training.resilience.damage_record import load_damaged

WORDS = [
    "recipe=ldm_avatars", "encoder=kl_gan", "encoder.channels=[16,16]", "encoder.groups=4", "encoder.latent_channels=4",
    "encoder.discriminator_weight=0", "encoder.middle_attention=false", "image_size=16", "source.n=40",
    "data.workers=1", "data.heldout_fraction=0.2", "refiner.width=32", "refiner.multipliers=[1]", "evaluate.batch=4",
    "data.max_bad_fraction=0.1",
]  # fmt: skip
PIXELS = ["denoiser.space=pixel", "cache.contents=reconstructions", "cache.draws=2"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_build, "SHARD_SIZE", 7)  # no multiple of the batch


def with_encoder(folder: Path, *words: str) -> Run:
    """A run whose encoder stage is finished; its weights are the first ones."""
    run = submit(config.compose("train", [*WORDS, f"run={folder}", *words]))
    ShardsStage(run.config()).run(run)
    run.save_weights("encoder", components.build_models(run.config()).encoder.state_dict())
    run.finish("encoder", {})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return with_encoder(tmp_path_factory.mktemp("cached") / "run", *PIXELS)


def settings_for(run: Run, folder: Path) -> Any:
    settings = run.config()
    own = cache.cache_settings(settings)
    return with_settings(settings, CacheStage.Config(cache=replace(own, folder=str(folder))))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def whole(run: Run) -> dict[str, bytes]:
    """The cache, written at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_build, "SHARD_SIZE", 7)
        settings = settings_for(run, run.path.parent / "whole")
        cache.write_cache(run, settings, load_models(run, settings, "encoder"))
    return content(run.path.parent / "whole")


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_in_any_order_give_the_bytes_of_one_write(
    run: Run, whole: dict[str, bytes], tmp_path: Path, parts: int
) -> None:
    settings = settings_for(run, tmp_path / "out")
    images = 0
    for number in reversed(range(parts)):
        made = load_models(run, settings, "encoder")
        images += cache.write_cache_part(run, settings, made, number, parts)
    assert not (tmp_path / "out").exists()
    cache.write_cache(run, settings, load_models(run, settings, "encoder"))
    assert content(tmp_path / "out") == whole
    assert images == cache.expected_cache(run, settings, components.build_models(settings)).images > 25


def test_a_part_interrupted_within_a_job_goes_on(
    run: Run, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, sample = settings_for(run, tmp_path / "out"), cache.cache_sample
    asked: list[int] = []

    def counted(config: Any, made: Any, wanted: Any, index: int, posterior: Any) -> Any:
        asked.append(index)
        if asked == list(range(11)):
            raise KeyboardInterrupt
        return sample(config, made, wanted, index, posterior)

    made = load_models(run, settings, "encoder")
    monkeypatch.setattr(cache, "cache_sample", counted)
    with pytest.raises(KeyboardInterrupt):
        cache.write_cache_part(run, settings, made, 0, 2)
    cache.write_cache_part(run, settings, made, 0, 2)
    cache.write_cache(run, settings, made)
    assert asked == [*range(11), *range(7, max(asked) + 1)]
    assert content(tmp_path / "out") == whole


def test_the_job_and_the_tool_beside_a_held_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_encoder(tmp_path / "run")
    shards = open_shards(run.config(), "train")
    file, offset, _ = shards.members.where(9, 0)
    flip(shards.folder / file, offset + 60)
    with run.held():
        CacheStage(run.own_config()).run_part(run, 0, 2)
        cache_tool.command([f"run={run.path}", "part=1", "parts=2"])
    said = capsys.readouterr().out
    assert "part=1 parts=2 has" in said
    assert "publishes the cache" in said
    assert [path.name for path in run.path.glob("*latents*")] == [".latents.building"]
    assert not load_damaged(run.path, "train")

    def never(*more: Any) -> Iterator[Any]:
        raise AssertionError("nothing is left to encode")

    monkeypatch.setattr(cache, "encode_images", never)
    CacheStage(run.config()).run(run)
    assert run.records()["cache"]["images"] > 25
    assert [path.name for path in run.path.glob("*latents*")] == ["latents"]
    assert list(load_damaged(run.path, "train")) == [9]
    cache_tool.command([f"run={run.path}", "part=0", "parts=2"])
    assert "publishes" not in capsys.readouterr().out


def test_other_weights_are_another_request_and_unfinished_ones_none(run: Run, tmp_path: Path) -> None:
    other = Run(tmp_path / "run")
    shutil.copytree(run.path, other.path)
    settings = settings_for(other, tmp_path / "out")
    made = load_models(other, settings, "encoder")
    cache.write_cache_part(other, settings, made, 0, 5)
    weights = {name: value + 0.01 for name, value in other.load_weights("encoder").items()}
    other.save_weights("encoder", weights)
    with pytest.raises(UserError, match=r"parts of another request are being made .*encoder_sha256"):
        cache.write_cache_part(other, settings, made, 1, 5)
    (other.path / "stages.json").unlink()  # as while they are being saved
    with pytest.raises(UserError, match="has no trained encoder yet, which a cache needs"):
        CacheStage(other.own_config()).run_part(other, 0, 2)
    other.weights("encoder").unlink()
    with pytest.raises(UserError, match="has no trained encoder yet"):
        CacheStage(other.own_config()).run_part(other, 0, 2)
    assert not list(other.path.glob(".latents*"))


@pytest.mark.parametrize(
    ("words", "says"),
    [(["parts=4"], "say which, part=0 to part=3"), (["part=4", "parts=4"], "part=4: use 0 to 3"),
     (["part=0", "parts=0"], "parts=0: use 1"), (["part=-1"], "part=-1: use 0 to 0")],
)  # fmt: skip
def test_no_such_part(run: Run, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        cache_tool.command([f"run={run.path}", *words])
