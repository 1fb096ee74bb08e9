"""Directions kept in a bundle: the round trip, and what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dvae.config import compose
from dvae.errors import UserError
from dvae.inference import directions
from dvae.inference.directions import Direction, DirectionMethod, direction_files
from dvae.inference.directions.label_regression import LabelModel
from dvae.models import bundle, bundle_export, components


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like a bundle to the store: weights of an encoder and of something else."""
    place = tmp_path / "run" / "bundle"
    place.mkdir(parents=True)
    weights = {"encoder.mu": torch.randn(3, 2), "encoder.count": torch.tensor(3), "denoiser.w": torch.randn(4)}
    save_file(weights, place / "model.safetensors")
    bundle.BundleInfo(format=bundle.FORMAT, dvae="0", parts=["encoder"], components={}, sha256={}).write(place)
    return place


def made(name: str, value: float = 1.0) -> Direction:
    return Direction(name, torch.full((4,), value), DirectionMethod.pca, "one standard deviation", share=0.25)


def change(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] + 1
    save_file(weights, folder / "model.safetensors")


def test_what_is_saved_is_loaded(folder: Path) -> None:
    model = LabelModel({"hair": ["bun", "bob"]}, torch.randn(5, 2).double(), torch.randn(2, 4).double())
    labeled = Direction(
        "hair.bun", torch.randn(4), DirectionMethod.labels, "from the present", "hair", "bun", model=model
    )
    z = torch.randn(9, 4)
    assert directions.names(folder) == []
    assert directions.save(folder, [labeled, made("pca_1")]) == folder / direction_files.FILE
    assert directions.names(folder) == ["hair.bun", "pca_1"]
    for place in (folder, folder.parent, str(folder)):  # a run folder too
        back = directions.load(place, "hair.bun")
        assert torch.equal(back.vector, labeled.vector)
        assert torch.equal(back.move(z, 1.5), labeled.move(z, 1.5))
        assert (back.method, back.unit, back.attribute, back.value, back.share) == (
            DirectionMethod.labels, "from the present", "hair", "bun", None,
        )  # fmt: skip
    assert directions.load(folder, "pca_1").share == 0.25
    assert sorted(path.name for path in folder.iterdir()) == [bundle.INFO, direction_files.FILE, "model.safetensors"]


def test_a_later_find_replaces_those_of_its_method(folder: Path) -> None:
    other = Direction("jacobian_1", torch.ones(4), DirectionMethod.jacobian, "")
    directions.save(folder, [made("pca_1"), made("pca_2"), other])
    directions.save(folder, [made("pca_1", 7.0)])
    assert directions.names(folder) == ["jacobian_1", "pca_1"]
    assert directions.load(folder, "pca_1").vector.tolist() == [7.0] * 4


def test_a_copy_of_the_bundle_has_them(folder: Path, tmp_path: Path) -> None:
    directions.save(folder, [made("pca_1")])
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert directions.names(tmp_path / "elsewhere") == ["pca_1"]


def test_an_unknown_name_gives_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match=r"none were found yet: use tools/directions\.py find="):
        directions.load(folder, "pca_1")
    directions.save(folder, [made("pca_1"), made("hair.bun")])
    with pytest.raises(UserError, match=r"direction=hair.bum: .* did you mean 'hair.bun'\? known: hair.bun, pca_1"):
        directions.load(folder, "hair.bum")


def test_other_weights_of_the_encoder_are_refused_and_of_all_else_not(folder: Path) -> None:
    directions.save(folder, [made("pca_1")])
    change(folder, "denoiser.w")
    assert directions.names(folder) == ["pca_1"]
    change(folder, "encoder.mu")
    with pytest.raises(UserError, match="was found for other weights of the encoder: find its directions again"):
        directions.load(folder, "pca_1")
    other = Direction("jacobian_1", torch.ones(4), DirectionMethod.jacobian, "")
    directions.save(folder, [other])  # which throws the stale ones away
    assert directions.names(folder) == ["jacobian_1"]


def test_a_damaged_file_is_named(folder: Path) -> None:
    directions.save(folder, [made("pca_1")])
    path = folder / direction_files.FILE
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=f"{direction_files.FILE}: .*: not a readable file of directions"):
        directions.names(folder)


def test_a_file_of_other_tensors_is_named(folder: Path) -> None:
    save_file({"pca_1": torch.ones(4)}, folder / direction_files.FILE)
    with pytest.raises(UserError, match="not a readable file of directions"):
        directions.names(folder)


def test_move_adds_the_vector_by_strength() -> None:
    one = made("pca_1", 2.0)
    z = torch.zeros(3, 4)
    assert one.move(z, 0.5).tolist() == [[1.0] * 4] * 3
    assert one.move(z, torch.tensor([0.0, 1.0, -1.0]))[:, 0].tolist() == [0.0, 2.0, -2.0]


def test_a_new_export_keeps_them_while_the_encoder_is_the_same(tiny: list[str], tmp_path: Path) -> None:
    composed = compose.compose("train", tiny)
    built = components.build_models(compose.to_run_config(composed))
    parts = {name: part.state_dict() for name, part in built.trained_parts().items()}
    place = tmp_path / "bundle"
    bundle_export.export(place, compose.to_run_config(composed), {"encoder": parts["encoder"]})
    directions.save(place, [Direction("pca_1", torch.ones(8), DirectionMethod.pca, "one standard deviation")])
    bundle_export.export(place, compose.to_run_config(composed), parts)  # the refiner is trained now
    assert directions.names(place) == ["pca_1"]
    changed = {name: value + 1 for name, value in parts["encoder"].items()}
    bundle_export.export(place, compose.to_run_config(composed), parts | {"encoder": changed})
    with pytest.raises(UserError, match="was found for other weights of the encoder"):
        directions.names(place)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def linked(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / "elsewhere"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def unlisted(path: Path) -> None:
    about = bundle.read_info(path.parent)
    del about.sha256[path.name]
    about.write(path.parent)


LEFT_OUT: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped byte": (flipped, "does not match the hash in bundle.json"),
    "a link to the same bytes": (linked, "is a link, not a file"),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("nowhere"))[1], "is a link, not a file"),
    "a pipe": (piped, "is a pipe, not a file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir())[1], "is a folder, not a file"),
    "no hash": (unlisted, "holds no hash of directions.safetensors"),
    "no bundle.json": (lambda path: (path.parent / bundle.INFO).unlink(), "bundle.json is missing"),
}


def test_a_new_export_leaves_out_directions_that_do_not_match_their_hash(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    composed = compose.compose("train", tiny)
    encoder = {
        "encoder": components.build_models(compose.to_run_config(composed)).trained_parts()["encoder"].state_dict()
    }
    for name, (damage, says) in LEFT_OUT.items():
        place = tmp_path / name / "bundle"
        bundle_export.export(place, compose.to_run_config(composed), encoder)
        directions.save(place, [Direction("pca_1", torch.ones(8), DirectionMethod.pca, "one standard deviation")])
        assert "directions" not in capsys.readouterr().err
        damage(place / direction_files.FILE)
        bundle_export.export(place, compose.to_run_config(composed), encoder)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1, name
        assert said[0].startswith("dvae: the new bundle has no directions, find them again: "), name
        assert says in said[0], name
        assert not os.path.lexists(place / direction_files.FILE), name
        assert direction_files.FILE not in bundle.read_info(place).sha256, name
        assert directions.names(place) == []


def test_directions_that_overflow_are_not_written(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'direction.pca_1' holds NaN or infinity"):
        directions.save(folder, [made("pca_1", float("inf"))])
    assert directions.names(folder) == []
