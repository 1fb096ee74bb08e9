"""The judge: on classes that anyone can tell apart, on images that show nothing, and its figures by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dvae.data.images import to_float
from dvae.data.shards.reader import Shards
from dvae.errors import UserError
from dvae.evaluation import recognizer

CLASSES = ["top", "left", "corner"]


def bars(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 1, 12, 12) of a bright bar at the top or the left, or of both, under noise, and their classes."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 1, 12, 12), generator=draw)
    labels = torch.randint(0, 3, (count,), generator=draw)
    images[labels != 1, :, 1:4] += 190
    images[labels != 0, :, :, 1:4] += 190
    return images.clamp(max=255).to(torch.uint8), labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    images, labels = bars(400, 0)
    return recognizer.train(lambda i: (images[i], labels[i]), len(images), 3, steps=150, batch=32, seed=0)


def test_classes_apart_are_all_recognized(trained: nn.Module) -> None:
    images, labels = bars(300, 1)
    found = recognizer.probabilities(trained, images, 64)
    assert found.shape == (300, 4)
    assert (found.argmax(1) == labels).all()
    figures = recognizer.summary(found, CLASSES, 0.9)
    assert figures["recognized"] > 0.97
    assert figures["classes_present"] == 3


def test_images_that_show_nothing_are_not_recognized(trained: nn.Module) -> None:
    noise = torch.randint(0, 256, (200, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    gray = torch.arange(0, 250, 5, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 12, 12)
    pixels = bars(200, 3)[0].flatten(1)
    mixed = pixels[:, torch.randperm(144, generator=torch.Generator().manual_seed(4))].view(-1, 1, 12, 12)
    for images in (noise, gray, mixed):
        figures = recognizer.summary(recognizer.probabilities(trained, images), CLASSES, 0.9)
        assert figures["recognized"] < 0.1
        assert figures["nothing"] > 0.8


def test_the_same_seed_gives_the_same_judge(trained: nn.Module) -> None:
    images, labels = bars(400, 0)
    before = torch.random.get_rng_state()
    again = recognizer.train(lambda i: (images[i], labels[i]), len(images), 3, steps=150, batch=32, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("size", [1, 4, 5, 28, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_of_image(size: int, channels: int) -> None:
    images = torch.randint(0, 256, (8, channels, size, size), dtype=torch.uint8)
    made = recognizer.train(lambda i: (images[i], torch.arange(8)[i] % 2), 8, 2, steps=2, batch=4, seed=0)
    assert recognizer.probabilities(made, images).shape == (8, 3)


def test_verdict_by_hand() -> None:
    found = torch.tensor([[0.95, 0.05, 0.0], [0.91, 0.0, 0.09], [0.5, 0.5, 0.0], [0.1, 0.3, 0.6]])
    assert recognizer.summary(found, ["a", "b"], 0.9) == {
        "n": 4,
        "recognized": 0.5,
        "nothing": 0.25,
        "classes_present": 1,
        "by_class": {"a": 2, "b": 0},
    }


def test_spoilt_images_keep_their_pixels_or_show_one() -> None:
    torch.manual_seed(0)
    x = to_float(bars(9, 5)[0])
    bad = recognizer.corrupt(x)
    for i in range(9):
        before, after = x[i].flatten(), bad[i].flatten()
        if i % 3 == 2:
            assert after.unique().numel() == 1
            assert after[0] in before
        else:
            assert torch.equal(before.sort().values, after.sort().values)
            assert not torch.equal(before, after)


def test_blended_is_the_mean_of_two() -> None:
    images = torch.tensor([0, 255, 100, 201], dtype=torch.uint8).view(4, 1, 1, 1)
    assert recognizer.blend_pairs(images).flatten().tolist() == [50, 228, 50, 228]


def test_shifts_move_the_whole_batch_and_no_further_than_two_of_28() -> None:
    torch.manual_seed(0)
    x = torch.zeros(2, 1, 28, 28)
    x[:, :, 14, 14] = 1.0
    places = {tuple(recognizer.random_shift(x)[1, 0].nonzero()[0].tolist()) for _ in range(300)}
    assert places == {(row, column) for row in range(12, 17) for column in range(12, 17)}
    small = x[..., 8:21, 8:21]
    assert torch.equal(recognizer.random_shift(small), small)  # less than 14 pixels wide


class Labeled:
    """Stands for a split of shards: only its labels are looked at."""

    folder = "shards"

    def __init__(self, **labels: list[str | int]) -> None:
        self.labels = labels


@pytest.mark.parametrize(
    ("labels", "word", "says"),
    [
        ({}, "", "have no labels"),
        ({"hair": [1, 2], "eyes": [1, 2]}, "", "name one of hair, eyes"),
        ({"hair": [1, 2], "eyes": [1, 2]}, "hairs", "did you mean"),
        ({"hair": ["red"]}, "", "one value only, red"),
    ],
)
def test_labels_that_cannot_be(labels: dict[str, list[str | int]], word: str, says: str) -> None:
    settings = recognizer.RecognizeConfig(run="r", label=word)
    with pytest.raises(UserError, match=says):
        recognizer.choose_attribute(settings, "", Labeled(**labels))  # type: ignore[arg-type]


def test_the_label_is_the_word_or_the_runs_or_the_only_one() -> None:
    two: Shards = Labeled(hair=["red", "gray"], eyes=[0, 1])  # type: ignore[assignment]
    assert recognizer.choose_attribute(recognizer.RecognizeConfig(run="r", label="eyes"), "hair", two) == (
        "eyes",
        ["0", "1"],
    )
    assert recognizer.choose_attribute(recognizer.RecognizeConfig(run="r"), "hair", two) == ("hair", ["red", "gray"])
    one: Shards = Labeled(eyes=[0, 1])  # type: ignore[assignment]
    assert recognizer.choose_attribute(recognizer.RecognizeConfig(run="r"), "", one) == ("eyes", ["0", "1"])


@pytest.mark.parametrize(("field", "value"), [("n", 0), ("steps", 0), ("batch", 0), ("confidence", 1.0)])
def test_settings_that_cannot_be(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        recognizer.recognize_samples(recognizer.RecognizeConfig(run="r", **{field: value}))  # type: ignore[arg-type]


def test_damaged_images_take_the_label_of_what_is_shown_instead() -> None:
    class Damaged:
        def classes(self, attribute: str, names: list[str]) -> torch.Tensor:
            return torch.tensor([0, 1, 1])

        def read(self, indices: np.ndarray) -> torch.Tensor:
            return torch.zeros(len(indices), 1, 2, 2, dtype=torch.uint8)

        def substituted(self, indices: np.ndarray) -> np.ndarray:
            return np.where(indices == 0, 1, indices)  # image 0 is damaged

    _, labels = recognizer.labeled_reader(Damaged(), "digit", ["0", "1"])(np.array([0, 2]))  # type: ignore[arg-type]
    assert labels.tolist() == [1, 1]
