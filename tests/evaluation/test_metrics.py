import subprocess
import sys

import pytest
import torch
import torch_fidelity
from sklearn.datasets import load_digits

from dvae.errors import UserError
from dvae.evaluation import metrics
from dvae.evaluation.features import FeatureMethod, compute_features
from dvae.evaluation.image_sets import TensorImages


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """80 real scans of digits, (80, 1, 8, 8), uint8."""
    return (torch.from_numpy(load_digits().images[:80]) * 15.9).to(torch.uint8).unsqueeze(1)


def lite0_features(images: torch.Tensor, batch: int = 64, advance=lambda count: None) -> torch.Tensor:
    method = FeatureMethod(extractor=metrics.lite0(), batch=batch, device="cpu")
    return compute_features(TensorImages(images), method, advance).pooled


@pytest.fixture(scope="module")
def features(digits) -> torch.Tensor:
    return lite0_features(digits)


class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_figures_are_those_of_torch_fidelity(digits, features):
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(digits[:40]),
        input2=Images(digits[40:]),
        cuda=False,
        kid=True,
        fid=True,
        feature_extractor=metrics.EXTRACTOR,
        kid_subset_size=20,
        kid_subsets=10,
        rng_seed=7,
        batch_size=17,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    mean, std = metrics.kid(features[:40], features[40:], subset_size=20, subsets=10, seed=7)
    assert mean == theirs["kernel_inception_distance_mean"]
    assert std == theirs["kernel_inception_distance_std"]
    assert metrics.fid(features[:40], features[40:]) == theirs["frechet_inception_distance"]


def test_features_do_not_depend_on_the_batch(digits, features):
    assert features.shape == (80, 1280)
    assert features.dtype == torch.float32
    counts = []
    assert torch.equal(lite0_features(digits[3:15], batch=5, advance=counts.append), features[3:15])
    assert counts == [5, 5, 2]


def test_features_are_those_of_the_whole_network(digits, features):
    """By hand: the classifier's scores, from the package's own forward, are its last layer on our features."""
    extractor = metrics._extractor("cpu")
    x = torch.nn.functional.interpolate(
        digits[:4].expand(-1, 3, -1, -1).float() / 255, size=(224, 224), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        scores = extractor.net((x - extractor.mean) / extractor.std)
        torch.testing.assert_close(extractor.net._fc(features[:4]), scores, atol=1e-3, rtol=1e-3)


def test_known_answers(features):
    assert metrics.kid(features, features, subset_size=80, subsets=1, seed=0)[0] == pytest.approx(
        _kid_by_hand(features, features), rel=1e-3
    )
    few = features[:, :32]
    assert metrics.fid(few, few) == pytest.approx(0, abs=1e-4)
    shift = torch.zeros(32)
    shift[0] = 3.0
    assert metrics.fid(few, few + shift) == pytest.approx(9.0, abs=1e-3)  # |mean difference|^2
    assert metrics.fid(few, 2 * few) == pytest.approx(
        float(few.double().mean(0).square().sum() + torch.cov(few.double().T).trace()), rel=1e-4
    )  # S + 4 S - 2 (4 S S)^(1/2) = S


def _kid_by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, equation 4)."""

    def kernel(a, b):
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    m = len(x)
    within = sum((k.sum() - k.diagonal().sum()) / (m * (m - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())


def test_too_few_images(features):
    with pytest.raises(UserError, match="kid_subset_size=50 is more than the 40 images there are: use 40 or less"):
        metrics.kid(features, features[:40], subset_size=50, subsets=2, seed=0)
    with pytest.raises(UserError, match="two images or more"):
        metrics.fid(features[:1], features)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)])
def test_other_tensors_are_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        TensorImages(images)


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import sys; sys.modules['torch_fidelity'] = None\n"
        "from dvae.errors import UserError\n"
        "try: import dvae.evaluation.metrics\n"
        "except UserError as error: sys.exit(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install torch-fidelity" in done.stderr
    assert len(done.stderr.splitlines()) == 1
