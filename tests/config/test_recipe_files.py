"""Recipes that users wrote: recipe=PATH, whatever is wrong with the file, and modules that it names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dvae.config import compose
from dvae.errors import UserError

OWN = """
defaults:
  - demo
  - override /refiner: unet_cifar10
  - _self_

seed: 3
train_refiner: {steps: 5, lr: 1e-3}
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_it_extends_a_recipe_and_is_named_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, OWN)
    monkeypatch.chdir(tmp_path)
    for word in (f"recipe={path}", "recipe=mine.yaml", "recipe=./mine.yaml"):
        config = compose.to_run_config(compose.compose("train", [word, "train_refiner.batch=6"]))
        assert (config.recipe, config.run, config.seed, config.image_size) == ("mine", "runs/mine", 3, 32)
        training = config.training("refiner")
        assert (training.steps, training.lr, training.batch) == (5, 1e-3, 6)
        assert config.refiner.dropout == 0.3


def test_its_own_name_and_values_count(tmp_path: Path) -> None:
    alone = write(tmp_path, "image_size: 16\n", "my set.yaml")
    config = compose.to_run_config(compose.compose("train", [f"recipe={alone}"]))
    assert (config.recipe, config.run) == ("my set", "runs/my set")
    named = write(tmp_path, "recipe: other\nimage_size: 16\n")
    assert compose.to_run_config(compose.compose("train", [f"recipe={named}"])).recipe == "other"


def test_a_file_with_the_name_of_a_recipe_does_not_replace_that(tmp_path: Path) -> None:
    path = write(tmp_path, OWN, "toy2d.yaml")
    assert compose.to_run_config(compose.compose("train", [f"recipe={path}"])).image_size == 32
    assert compose.to_run_config(compose.compose("train", ["recipe=toy2d"])).channels == 2


def test_the_file_is_read_anew(tmp_path: Path) -> None:
    for seed in (1, 2):
        path = write(tmp_path, f"image_size: 16\nseed: {seed}\n")
        assert compose.to_run_config(compose.compose("train", [f"recipe={path}"])).seed == seed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not valid YAML"),
        ("- demo", "is not a mapping"),
        ("defaults: 3", "has defaults that are no list"),
        ("defaults: [[demo]]", "has defaults that are no list"),
        ("defaults: [{override /refiner: unet, x: 3}]", "Hydra cannot read its defaults"),
        ("defaults: [file_mine]", "Hydra cannot read its defaults"),
        ("defaults: [demoo]", "unknown recipe 'demoo': did you mean 'demo'?"),
        ("defaults: [{override /refiner: unett}]", "unknown refiner 'unett': did you mean 'unet'?"),
        ("train_refinr: {steps: 3}", "unknown field 'train_refinr': did you mean 'train_refiner'?"),
        ("train_refiner: {stepz: 3}", "unknown field 'train_refiner.stepz': did you mean 'steps'?"),
        ("train_refiner.steps: 3", "unknown field 'train_refiner.steps'"),
        ("refiner: {widh: 3}", "unknown field 'refiner.widh': `python tools/components.py` lists fields"),
        ("seed: abc", "Value 'abc' of type 'str' could not be converted to Integer"),
        ("plugins: 3", "plugins: '3' is no module"),
        ("plugins: [nothing_here]", "module 'nothing_here' cannot be imported"),
        ("seed: 3", "not set: image_size"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as raised:
        compose.to_run_config(compose.compose("train", [f"recipe={path}"]))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: os.mkfifo(path)])
def test_no_file(tmp_path: Path, make: object) -> None:
    make(tmp_path / "mine.yaml")  # type: ignore[operator]
    with pytest.raises(UserError, match=r"recipe=.*mine\.yaml"):
        compose.compose("train", [f"recipe={tmp_path}/mine.yaml"])


def test_modules_that_it_names_are_imported_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "LOADED = True\n", "module_of_a_recipe.py")
    path = write(tmp_path, OWN + "plugins: [module_of_a_recipe]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # restores sys.path afterwards
    config = compose.to_run_config(compose.compose("train", [f"recipe={path}"]))
    assert config.plugins == ["module_of_a_recipe"]
