"""The model that a sampler integrates: a denoiser with its condition, guidance and threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Denoiser, Space
from dvae.diffusion.kernels import Diffusion, Prediction, Time
from dvae.diffusion.linalg import apply_matrix
from dvae.diffusion.sampler_model import Threshold
from dvae.errors import UserError
from dvae.registry.classifiers.base import Classifier

QUANTILE = 0.995
"""Quantile of an image's absolute pixel values at which dynamic thresholding cuts (Saharia et al. 2022, appendix E)."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance weights. The defaults give the conditional model without guidance."""

    condition: float = 1.0
    """Weight w in eps(0) + w (eps(c) - eps(0)), with c = (x_hat, z, class). 0 is the unconditional model and 1 the
    conditional model. The weight of Ho & Salimans 2022 is w - 1."""
    label: float = 1.0
    """Weight for the class alone: eps(c) above is eps(x_hat, z) + label (eps(x_hat, z, class) - eps(x_hat, z))."""
    pca: float = 1.0
    """Weight for the principal coordinates of z alone (denoiser.pca_components), in the same form."""
    classifier: float = 0.0
    """Factor on the gradient of log p(class | u_t) (Dhariwal & Nichol 2021, section 4). 0 uses no classifier."""


class GuidedDenoiser:
    """A denoiser with its condition and guidance. It is a SamplerModel (dvae.diffusion.sampler_model).

    Raises UserError if the denoiser was not trained for the guidance, or if the guidance needs a classifier or a class
    that is missing.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioning: Conditioning,
        guidance: Guidance = Guidance(),
        classifier: Classifier | None = None,
    ) -> None:
        _check(denoiser, conditioning, guidance, classifier)
        self.denoiser, self.conditioning, self.guidance, self.classifier = denoiser, conditioning, guidance, classifier
        self._views = _weighted_views(guidance, conditioning)

    @property
    def diffusion(self) -> Diffusion:
        return self.denoiser.diffusion

    @property
    def nfe_per_call(self) -> int:
        """Evaluations of the refiner per call, one per view of nonzero weight. The classifier is not counted."""
        return len(self._views)

    def __getitem__(self, rows: torch.Tensor) -> GuidedDenoiser:
        return GuidedDenoiser(self.denoiser, self.conditioning[rows], self.guidance, self.classifier)

    def __call__(self, u: torch.Tensor, t: Time, *, threshold: Threshold = Threshold.none) -> Prediction:
        times = torch.as_tensor(t, dtype=torch.float64).expand(len(u))
        views = [(weight, self._predict(u, times, conditioning)) for weight, conditioning in self._views]
        eps, x0 = views[0][1]
        if len(views) > 1:
            eps = sum((weight * view[0] for weight, view in views), torch.zeros_like(eps))
            x0 = sum((weight * view[1] for weight, view in views), torch.zeros_like(x0))
        if self.guidance.classifier:
            # the gradient is added to the score, and eps = -L^T score
            eps = eps - apply_matrix(
                self.diffusion.marginal(times)[1].mT, self.guidance.classifier * self._gradient(u, times)
            )
            # for k > 1, remove the part of the changed eps that does not agree with u
            eps = self.diffusion.project_eps(u, times, eps)
            x0 = self.diffusion.x0_from_eps(u, times, eps)
        if threshold is not Threshold.none and self.denoiser.config.space is Space.pixel:  # latents are unbounded
            image = apply_threshold(self.denoiser.to_image(x0, self.conditioning), threshold)
            kept = self.denoiser.to_state(image, self.conditioning)
            eps, x0 = self.diffusion.shift_eps(kept - x0, times, eps), kept
        return Prediction(eps=eps, x0=x0, score=self.diffusion.score_from_eps(eps, times))

    def _predict(
        self, u: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (eps, x0) under `conditioning`.

        If x_hat is dropped, its shift is dropped too. The same noisy image is then a different state, so u is moved
        before the prediction and x0 is moved back after it.
        """
        if conditioning.x_hat is self.conditioning.x_hat:
            return self.denoiser.predict(u, t, conditioning)
        moved = self.denoiser.data_scale * (self.denoiser.shift(self.conditioning) - self.denoiser.shift(conditioning))
        mean = apply_matrix(self.diffusion.marginal(t)[0], self.diffusion.initial_state(moved))
        eps, x0 = self.denoiser.predict(u + mean, t, conditioning)
        return eps, x0 - moved

    def _gradient(self, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the classifier's grad_u log p(class | u_t), (B, k*C, H, W), at times t (B,)."""
        assert self.classifier is not None
        assert self.conditioning.label is not None
        feature = self.diffusion.schedule.time_feature(t).to(u.device, torch.float32)
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            logits = self.classifier(u, feature, self.denoiser.build_condition(self.conditioning)).float()
            chosen = torch.log_softmax(logits, 1).gather(1, self.conditioning.label[:, None].to(u.device))
            return torch.autograd.grad(chosen.sum(), u)[0]


def _weighted_views(guidance: Guidance, conditioning: Conditioning) -> list[tuple[float, Conditioning]]:
    """Return pairs (weight, conditioning). The guided prediction is the weighted sum of their predictions.

    The weights add up to 1. Pairs of weight 0 are left out, because each pair costs one network evaluation.
    """
    w, label, pca = guidance.condition, guidance.label, guidance.pca
    keep_none = torch.zeros(len(conditioning.z), dtype=torch.bool)
    views = [
        (w * label * pca, conditioning),
        (w * label * (1.0 - pca), conditioning.drop_pca(keep_none)),
        (w * (1.0 - label), conditioning.drop_label(keep_none)),
        (1.0 - w, conditioning.drop(keep_none)),
    ]
    return [(weight, view) for weight, view in views if weight]


def apply_threshold(images: torch.Tensor, threshold: Threshold) -> torch.Tensor:
    """Return images (B, C, H, W) limited to [-1, 1] by `threshold`, which is clamp or dynamic."""
    if threshold is Threshold.clamp:
        return images.clamp(-1.0, 1.0)
    limit = torch.quantile(images.float().abs().flatten(1), QUANTILE, dim=1).clamp(min=1.0).to(images.dtype)
    limit = limit.view(-1, 1, 1, 1)
    return torch.maximum(torch.minimum(images, limit), -limit) / limit


def _check(denoiser: Denoiser, conditioning: Conditioning, guidance: Guidance, classifier: Classifier | None) -> None:
    config = denoiser.config
    if guidance.condition != 1.0 and not config.condition_dropout:
        raise UserError(
            f"guidance={guidance.condition} needs a refiner trained with denoiser.condition_dropout above 0: "
            "use guidance=1"
        )
    if guidance.label != 1.0 and not (config.condition_label and config.label_dropout):
        raise UserError(
            f"label_guidance={guidance.label} needs a refiner trained with denoiser.condition_label=true and "
            "denoiser.label_dropout above 0: use label_guidance=1"
        )
    if guidance.pca != 1.0 and not (config.pca_components and config.pca_dropout):
        raise UserError(
            f"pca_guidance={guidance.pca} needs a refiner trained with denoiser.pca_components and "
            "denoiser.pca_dropout above 0: use pca_guidance=1"
        )
    if not guidance.classifier:
        return
    if classifier is None:
        raise UserError(
            f"classifier_guidance={guidance.classifier} needs a run with a trained classifier: "
            "add classifier=half_unet and the stage classifier"
        )
    if conditioning.label is None or bool((conditioning.label < 0).any()):
        raise UserError(f"classifier_guidance={guidance.classifier} needs a class: give label=NAME")
    if denoiser.diffusion.schedule.zero_terminal_snr:
        raise UserError(
            f"classifier_guidance={guidance.classifier} is not defined at t = 1 of this schedule, because B is "
            "infinite there: use classifier_guidance=0"
        )
