from __future__ import annotations

import math

import pytest
import torch

from dvae.layers.embeddings import grid_positions, sinusoidal, time_features
from dvae.layers.ncsnpp_blocks import GaussianFourierFeatures, positional_embedding


def test_grid_positions_known_answers():
    got = grid_positions(3, 8)  # two frequencies, 1 and 1/100
    assert got.shape == (9, 8)
    assert got.dtype == torch.float32
    row, column = 2, 1
    wanted = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    torch.testing.assert_close(got[3 * row + column], torch.tensor(wanted))


def test_grid_positions_all_differ():
    got = grid_positions(16, 64)
    assert (torch.cdist(got, got) + 9 * torch.eye(256)).min() > 0.5


def test_positional_known_answers():
    got = positional_embedding(torch.tensor([0.0, 2.0]), 6)  # three frequencies: 1, 1/100, 1/10000
    torch.testing.assert_close(got[0], torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))
    angles = [2.0, 0.02, 0.0002]
    torch.testing.assert_close(got[1], torch.tensor([*map(math.sin, angles), *map(math.cos, angles)]))


def test_fourier_known_answers():
    torch.manual_seed(0)
    fourier = GaussianFourierFeatures(4, scale=16.0)
    got = fourier(torch.tensor([1.0, 0.5, 0.0, 1e-5]))
    torch.testing.assert_close(got[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    angles = 2 * math.pi * fourier.W.double() * math.log(0.5)
    torch.testing.assert_close(got[1].double(), torch.cat([angles.sin(), angles.cos()]), rtol=0, atol=1e-4)
    assert torch.equal(got[2], got[3])  # log 0 is not taken
    assert GaussianFourierFeatures(10_000, 16.0).W.std() == pytest.approx(16.0, rel=0.05)


def distance(features: torch.Tensor) -> float:
    """Distance of two embeddings, as a share of their length."""
    return float((features[0] - features[1]).norm() / features[0].norm())


def test_what_separates_small_times():
    t = torch.tensor([1e-5, 1e-4])
    torch.manual_seed(0)
    assert distance(positional_embedding(t, 128)) < 1e-4  # the public code of PSLD: one time to the network
    assert distance(sinusoidal(1000.0 * t, 128)) == pytest.approx(0.0225, abs=1e-3)
    assert distance(time_features(1000.0 * t, 64)) > 0.5
    assert distance(GaussianFourierFeatures(128, 16.0)(t)) > 1.0


def test_time_features_are_of_t_and_of_its_logarithm():
    got = time_features(torch.tensor([0.0, 1000.0]), 8)
    torch.testing.assert_close(got[:, :8], sinusoidal(torch.tensor([0.0, 1000.0]), 8))
    torch.testing.assert_close(got[:, 8:], got[:, :8], rtol=0, atol=1e-4)  # both scales agree at their ends
