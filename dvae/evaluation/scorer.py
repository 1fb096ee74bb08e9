"""Score sets of generated images against real images, and compute the floor: real images scored in the same way.

`score_tensors` scores the images of a run's own evaluation, and `Scorer` the images of tools/evaluate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dvae.errors import UserError
from dvae.evaluation import metrics
from dvae.evaluation.features import FeatureMethod, cached_features, compute_features
from dvae.evaluation.image_sets import ImageSet, TensorImages
from dvae.evaluation.metric_suite import Metric, MetricSuite
from dvae.evaluation.metrics import Features
from dvae.evaluation.protocol import EvaluationProtocol
from dvae.tracking.console import Progress

Result = dict[str, Any]
"""{"protocol": {...}, "sets": {name: figures}, "floor": {"heldout": figures, "reference halves": figures}}, JSON-ready.

`figures` is {"n", "n_reference", metric: {"mean", "se", "per_seed", ...}}. "se" is the standard error over seeds, or
None for one seed. The floor is the score of real images; see MetricSuite.floor."""


@dataclass(frozen=True)
class Scorer:
    """Computes the features of image sets, and compares them with the features of real images."""

    method: FeatureMethod
    """How features are computed."""
    suite: MetricSuite
    """The metrics."""
    reference: ImageSet
    """Real images that sets are compared with."""
    heldout: ImageSet | None
    """Other real images, for the floor."""
    reference_split: str
    """Split of the reference, for the protocol."""
    cache: Path
    """Folder in which features of real images are cached."""

    @cached_property
    def reference_sha256(self) -> str:
        """Hash of the reference images."""
        return self.reference.sha256()

    def real_features(self) -> tuple[Features, Features | None]:
        """Features of the reference and of the held-out images, from the cache if possible."""
        sets = [self.reference, *([self.heldout] if self.heldout else [])]
        with Progress("real images", sum(map(len, sets))) as bar:
            found = [
                cached_features(images, self._sha256(images), self.method, self.cache, advancing(bar))
                for images in sets
            ]
        return found[0], found[1] if self.heldout else None

    def _sha256(self, images: ImageSet) -> str:
        return self.reference_sha256 if images is self.reference else images.sha256()

    def set_features(self, sets: Mapping[str, Sequence[ImageSet]]) -> dict[str, list[Features]]:
        """Features of generated images. They are not cached."""
        with Progress("samples", sum(len(images) for parts in sets.values() for images in parts)) as bar:
            return {
                name: [compute_features(images, self.method, advancing(bar)) for images in parts]
                for name, parts in sets.items()
            }

    def score(
        self,
        sets: Mapping[str, Sequence[ImageSet]],
        *,
        n: int,
        seeds: Sequence[int],
        sampler: Mapping[str, Any],
        nfe: float,
        made: Mapping[str, Any] | None = None,
    ) -> Result:
        """Compute the metrics of sets of images, and of the floor.

        `sets` has, under each name, one ImageSet of `n` images per seed. `seeds`, `sampler`, `nfe` and `made` are only
        entered in the protocol.
        """
        real, unseen = self.real_features()
        generated = self.set_features(sets)
        protocol = self.protocol(n, seeds, sampler, nfe, made)
        parts = len(next(iter(sets.values())))
        return {
            "protocol": asdict(protocol),
            "sets": {name: self.suite.figures(features, real) for name, features in generated.items()},
            "floor": self.suite.floor(real, unseen, n, parts),
        }

    def protocol(
        self, n: int, seeds: Sequence[int], sampler: Mapping[str, Any], nfe: float, made: Mapping[str, Any] | None
    ) -> EvaluationProtocol:
        """The protocol of a result. The settings of metrics that are not computed are None."""
        suite, extractor = self.suite, self.method.extractor
        kid, fixed_threads = Metric.kid in suite.metrics, self.method.threads is not None
        return EvaluationProtocol(
            backend=metrics.backend(),
            extractor=extractor.name,
            weights_sha256=extractor.weights_sha256,
            resize=extractor.resize,
            image_size=self.reference.size()[0],
            n=n,
            reference_split=self.reference_split,
            n_reference=len(self.reference),
            reference_sha256=self.reference_sha256,
            seeds=list(seeds),
            kid_subset_size=suite.kid_subset_size if kid else None,
            kid_subsets=suite.kid_subsets if kid else None,
            kid_seed=suite.seed,
            prc_neighborhood=suite.prc_neighborhood if Metric.prc in suite.metrics else None,
            isc_splits=suite.isc_splits if Metric.isc in suite.metrics else None,
            sampler=dict(sampler),
            nfe=nfe,
            packages=metrics.packages(),
            made=dict(made or {}),
            batch=self.method.batch if fixed_threads else None,
            threads=self.method.threads,
        )


def advancing(bar: Progress) -> Callable[[int], None]:
    """Return a function that advances a progress bar by a number of images."""
    return lambda count: bar.update(bar.step + count, count)


def score_tensors(
    sets: Mapping[str, Sequence[torch.Tensor]],
    reference: torch.Tensor,
    heldout: torch.Tensor,
    *,
    seeds: Sequence[int],
    sampler: Mapping[str, Any],
    nfe: float,
    kid_subset_size: int,
    kid_subsets: int,
    cache: Path,
    reconstructions: torch.Tensor | None = None,
    reference_split: str = "train",
    batch: int = 64,
) -> Result:
    """Compute KID-lite0 and FID-lite0 of each named set of images against `reference`.

    Raises UserError if there are too few images.

    Args:
        sets: Name -> one tensor (n, C, H, W) uint8 for each seed. All have the same n.
        reference: Real images (M, C, H, W) uint8.
        heldout: Other real images (K, C, H, W) uint8, for the floor.
        seeds: Seeds of the sets.
        sampler: Settings of the sampler, for the protocol.
        nfe: Network evaluations per image, for the protocol.
        kid_subset_size: Number of images per subset of KID.
        kid_subsets: Number of subsets of KID.
        cache: Folder in which the features of real images are cached.
        reconstructions: Reconstructions of held-out images, (R, C, H, W) uint8. They are one more set, unless R is less
            than `kid_subset_size`.
        reference_split: Split of the reference, for the protocol.
        batch: Number of images per forward pass of the extractor.
    """
    n = _common_count(sets, seeds)
    suite = MetricSuite(
        metrics=(Metric.kid, Metric.fid), suffix="-lite0", kid_subset_size=kid_subset_size, kid_subsets=kid_subsets
    )
    suite.check("a set", n)
    suite.check("the reference", len(reference))
    heldout = heldout[: n * len(seeds)]
    _check_floor(kid_subset_size, len(heldout), min(n, len(reference) // 2))
    image_sets = {name: list(map(TensorImages, images)) for name, images in sets.items()}
    if reconstructions is not None and len(reconstructions) >= kid_subset_size:
        image_sets["reconstructions"] = [TensorImages(reconstructions)]
    scorer = Scorer(
        method=FeatureMethod(extractor=metrics.lite0(), batch=batch, device=str(reference.device)),
        suite=suite,
        reference=TensorImages(reference),
        heldout=TensorImages(heldout) if len(heldout) else None,
        reference_split=reference_split,
        cache=cache,
    )
    result = scorer.score(image_sets, n=n, seeds=seeds, sampler=sampler, nfe=nfe)
    return result | {"floor": {name: of for name, of in result["floor"].items() if "KID-lite0" in of}}


def _common_count(sets: Mapping[str, Sequence[torch.Tensor]], seeds: Sequence[int]) -> int:
    """The number of images of a set. Raises ValueError if it differs between sets, which would not be comparable."""
    counts = {len(images) for images_of in sets.values() for images in images_of}
    if len(counts) != 1 or any(len(images_of) != len(seeds) for images_of in sets.values()):
        raise ValueError(f"want one tensor per seed, all of one length: {len(seeds)} seeds, lengths {sorted(counts)}")
    return counts.pop()


def _check_floor(kid_subset_size: int, heldout: int, half: int) -> None:
    """Raise UserError if neither the held-out images nor half of the reference are enough for a floor of KID."""
    if (enough := max(heldout, half)) < kid_subset_size:
        raise UserError(f"kid_subset_size={kid_subset_size} leaves no real images for the floor: use {enough} or less")
