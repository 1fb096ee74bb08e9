import json
import statistics

import pytest
import torch
from sklearn.datasets import load_digits

from dvae.errors import MachineError, UserError
from dvae.evaluation import metrics
from dvae.evaluation.metrics import Extractor, Features
from dvae.evaluation.protocol import EvaluationProtocol
from dvae.evaluation.scorer import score_tensors


def pixels(images: torch.Tensor) -> torch.Tensor:
    """64 pixels of gray images."""
    return images[:, 0].flatten(1).float() / 255


def extract_pixels(_: Extractor, images: torch.Tensor) -> Features:
    """Stands in for the network, whose features test_metrics.py checks: pixels, so that FID takes milliseconds."""
    return Features(pixels(images))


@pytest.fixture(autouse=True)
def small_features(monkeypatch):
    monkeypatch.setattr(metrics, "extract", extract_pixels)


def digits(start: int, stop: int) -> torch.Tensor:
    return (torch.from_numpy(load_digits().images[start:stop]) * 15.9).to(torch.uint8).unsqueeze(1)


def arguments(cache, **changed):
    sets = {"vae": [digits(0, 12) // 3, digits(12, 24) // 3], "refined": [digits(0, 12), digits(12, 24)]}
    known = {
        "sets": sets,
        "reference": digits(24, 54),
        "heldout": digits(54, 80),
        "seeds": [0, 1],
        "sampler": {"name": "ddim", "steps": 4},
        "nfe": 4,
        "kid_subset_size": 10,
        "kid_subsets": 5,
        "cache": cache,
    }
    return known | changed


def test_figures_floor_and_protocol(tmp_path):
    result = score_tensors(**arguments(tmp_path))
    assert json.loads(json.dumps(result)) == result
    refined = result["sets"]["refined"]
    real = pixels(digits(24, 54))
    by_hand = [metrics.kid(pixels(part), real, 10, 5, 2020)[0] for part in (digits(0, 12), digits(12, 24))]
    assert refined["KID-lite0"]["per_seed"] == by_hand
    assert refined["KID-lite0"]["mean"] == pytest.approx(sum(by_hand) / 2)
    assert refined["KID-lite0"]["se"] == pytest.approx(statistics.stdev(by_hand) / 2**0.5)
    assert (refined["n"], refined["n_reference"]) == (12, 30)
    assert refined["KID-lite0"]["mean"] < result["sets"]["vae"]["KID-lite0"]["mean"]
    assert result["sets"]["vae"]["FID-lite0"]["per_seed"][1] == metrics.fid(pixels(digits(12, 24) // 3), real)
    floor = result["floor"]["heldout"]
    assert (floor["n"], floor["n_reference"], len(floor["KID-lite0"]["per_seed"])) == (12, 30, 2)
    assert floor["KID-lite0"]["per_seed"][1] == metrics.kid(pixels(digits(66, 78)), real, 10, 5, 2020)[0]
    halves = result["floor"]["reference halves"]
    assert (halves["n"], halves["n_reference"], halves["KID-lite0"]["se"]) == (12, 18, None)
    assert halves["KID-lite0"]["mean"] == metrics.kid(real[:12], real[12:], 10, 5, 2020)[0]
    protocol = EvaluationProtocol.read(result["protocol"])
    assert (protocol.n, protocol.n_reference, protocol.seeds, protocol.nfe, protocol.image_size) == (
        12,
        30,
        [0, 1],
        4,
        8,
    )


def test_features_of_real_images_are_kept(tmp_path, monkeypatch):
    few = {"sets": {"refined": [digits(0, 12)]}, "seeds": [0]}
    first = score_tensors(**arguments(tmp_path, **few))
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2  # reference and held-out
    computed = []
    monkeypatch.setattr(
        metrics, "extract", lambda extractor, images: computed.append(len(images)) or extract_pixels(extractor, images)
    )
    assert score_tensors(**arguments(tmp_path, **few)) == first
    assert computed == [12]
    score_tensors(**arguments(tmp_path, reference=digits(25, 55), **few))
    assert computed == [12, 30, 12]  # another reference, another key
    kept[0].write_bytes(b"damaged")
    with pytest.raises(MachineError, match=r"features-.*\.safetensors: damaged"):
        score_tensors(**arguments(tmp_path, **few))


def test_too_few_images(tmp_path):
    with pytest.raises(UserError, match="kid_subset_size=13 is more than the 12 images of a set"):
        score_tensors(**arguments(tmp_path, kid_subset_size=13))
    with pytest.raises(UserError, match="more than the 9 images of the reference: use 9 or less"):
        score_tensors(**arguments(tmp_path, reference=digits(24, 33)))
    with pytest.raises(UserError, match="leaves no real images for the floor: use 9 or less"):
        score_tensors(**arguments(tmp_path, reference=digits(24, 36), heldout=digits(54, 63)))


def test_few_heldout_images_say_so(tmp_path):
    one = {"sets": {"refined": [digits(0, 12)]}, "seeds": [0]}
    assert score_tensors(**arguments(tmp_path, heldout=digits(54, 65), **one))["floor"]["heldout"]["n"] == 11
    assert set(score_tensors(**arguments(tmp_path, heldout=digits(54, 54), **one))["floor"]) == {"reference halves"}


def test_sets_must_match_the_seeds(tmp_path):
    with pytest.raises(ValueError, match="one tensor per seed"):
        score_tensors(**arguments(tmp_path, seeds=[0]))
    with pytest.raises(ValueError, match="all of one length"):
        score_tensors(**arguments(tmp_path, sets={"a": [digits(0, 12), digits(12, 25)]}))
