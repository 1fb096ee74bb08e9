"""The denoiser: refiner, diffusion, condition and loss in one module, so that all of them use the same scaling.

Coordinates. The clean state of the diffusion is y_0 = data_scale * (x - shift), for an image x:

    center     shift    input of the refiner   description
    none       0        u                      DiffuseVAE formulation 1
    input      0        u + x_hat              DiffuseVAE formulation 2 (in the coordinate y = x_t - x_hat)
    residual   x_hat    u                      the refiner generates only the residual x - x_hat

If a sample's condition is dropped (classifier-free training), its x_hat is zero, and therefore its shift too.

In latent space (Rombach et al. 2022), x is the encoder's latent map instead of an image. Then x_hat is zero, there is
no separate z, and the clean state is y_0 = data_scale * x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import nn

from dvae.diffusion.conditioning import NO_LABEL, Conditioning, NoiseSample
from dvae.diffusion.kernels import Diffusion, Factor, Matching
from dvae.diffusion.linalg import apply_matrix, per_sample
from dvae.diffusion.objective import LossConfig, Objective, PredictionType
from dvae.errors import UserError
from dvae.layers.whitening import Whitening
from dvae.registry.core import Shapes
from dvae.registry.refiners.base import NetworkCondition, Refiner
from dvae.utils import rng


class Center(Enum):
    """How x_hat enters, apart from concatenation. The table in the module docstring defines the values."""

    none = "none"
    input = "input"
    residual = "residual"


class Space(Enum):
    """Space of the diffusion."""

    pixel = "pixel"
    latent = "latent"


@dataclass(kw_only=True, slots=True)
class DenoiserConfig:
    """Settings of the denoiser."""

    space: Space = Space.pixel
    """pixel: diffuse images, conditioned on x_hat; latent: diffuse the encoder's latent maps, which its decoder turns
    into images."""
    prediction: PredictionType = PredictionType.eps
    """Quantity that the refiner predicts: eps (DDPM, DiffuseVAE, PSLD), x0, or v (also for flow matching and EDM). x0
    and v need k = 1."""
    mixed: bool = False
    """Mixed score: add the eps of standard normal data to the refiner's output (Dockhorn et al. 2022, section 3.3)."""
    matching: Matching = Matching.hsm
    """hsm | dsm: hybrid or denoising score matching. It makes a difference for k > 1 only."""
    factor: Factor = Factor.lower
    """lower | upper: triangular factor of the covariance that multiplies the noise. It matters for k > 1 only."""
    center: Center = Center.none
    """none: DiffuseVAE formulation 1; input: formulation 2; residual: diffuse the residual x - x_hat."""
    data_scale: float | None = 1.0
    """Factor on the clean state, above 0. null: 1 / standard deviation of x - shift, measured on training images when
    the stage starts."""
    condition_image: bool = True
    """Concatenate x_hat to the refiner's input."""
    condition_latent: bool = False
    """Condition the refiner on z too (latent guidance)."""
    condition_label: bool = False
    """Condition the refiner on the class too."""
    condition_dropout: float = 0.0
    """Probability in [0, 1], per sample, of dropping all conditions together in training. guidance != 1 needs a value
    above 0."""
    pca_components: int = 0
    """Number of principal components of z whose whitened coordinates are added to latent guidance. 0: none."""
    pca_dropout: float = 0.1
    """Probability in [0, 1], per sample, of dropping the principal coordinates alone. pca_guidance != 1 needs a value
    above 0."""
    label_dropout: float = 0.0
    """Probability in [0, 1], per sample, of dropping the class alone. label_guidance != 1 needs a value above 0."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The training objective: weights and times."""


class Denoiser(nn.Module):
    """Loss and prediction of a conditional refiner. All computation outside the network runs in fp32.

    Raises UserError if the settings contradict each other, the diffusion or the shapes.
    """

    data_scale: torch.Tensor

    def __init__(self, refiner: Refiner, diffusion: Diffusion, config: DenoiserConfig, shapes: Shapes) -> None:
        super().__init__()
        _check(config, diffusion, shapes)
        self.refiner = refiner
        self.diffusion = diffusion
        self.config = config
        self.shapes = shapes
        self.objective = Objective(config.loss, diffusion, config.prediction)
        if config.pca_components:
            size = math.prod(shapes.latent)
            self.whitening = Whitening(config.pca_components, size)
            # zero at initialization, so that the coordinates have no effect until training gives them one
            self.pca_projection = nn.Parameter(torch.zeros(size, config.pca_components))
        # a buffer, so that checkpoints save a measured scale with the weights
        self.register_buffer("data_scale", torch.tensor(config.data_scale or 1.0, dtype=torch.float32))

    def shift(self, conditioning: Conditioning) -> torch.Tensor:
        """Return the shift of the clean state, (B, C, H, W): x_hat for center=residual, otherwise zero."""
        return conditioning.x_hat if self.config.center is Center.residual else torch.zeros_like(conditioning.x_hat)

    def to_state(self, x: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the clean states y_0 of images x; both are (B, C, H, W)."""
        return self.data_scale * (x - self.shift(conditioning))

    def to_image(self, state: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the images of clean states; both are (B, C, H, W). This is the inverse of `to_state`."""
        return state / self.data_scale + self.shift(conditioning)

    def sample_noise(self, seed: int, keys: torch.Tensor) -> NoiseSample:
        """Draw times, noise and the masks that drop conditions, for the global sample numbers `keys` (B,) int64."""
        numbers, config = keys.tolist(), self.config
        t, weight = self.objective.sample_times(rng.uniform(seed, "time", numbers))
        shape = (self.shapes.k * self.shapes.channels, self.shapes.image_size, self.shapes.image_size)
        keep = rng.uniform(seed, "drop", numbers) >= config.condition_dropout
        keep_label = keep_pca = aux_noise = None
        if config.pca_components:
            keep_pca = rng.uniform(seed, "drop pca", numbers) >= config.pca_dropout
        if config.condition_label:
            keep_label = keep & (rng.uniform(seed, "drop label", numbers) >= config.label_dropout)
        if self.shapes.k > 1 and config.matching is Matching.dsm:
            aux_noise = rng.normal(seed, "start", numbers, shape)
        return NoiseSample(t, rng.normal(seed, "noise", numbers, shape), keep, keep_label, keep_pca, weight, aux_noise)

    def build_condition(self, conditioning: Conditioning) -> NetworkCondition:
        """Return the condition that the refiner receives besides state and time."""
        label = None
        if self.config.condition_label:
            none = torch.full((len(conditioning.z),), NO_LABEL, device=conditioning.z.device)
            label = none if conditioning.label is None else conditioning.label
            label = torch.where(label == NO_LABEL, self.shapes.labels, label)
        return NetworkCondition(
            image=conditioning.x_hat if self.config.condition_image else None,
            latent=self._latent_condition(conditioning) if self.config.condition_latent else None,
            label=label,
        )

    def _latent_condition(self, conditioning: Conditioning) -> torch.Tensor:
        """Return z (B, *latent) plus the projection of its whitened principal coordinates, if the refiner has them."""
        if not self.config.pca_components:
            return conditioning.z
        coordinates = self.whitening(conditioning.z)
        if conditioning.pca is not None:
            coordinates = coordinates * per_sample(conditioning.pca, coordinates)
        return conditioning.z + (coordinates @ self.pca_projection.T).view_as(conditioning.z)

    def network_output(self, u: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the refiner's raw output for states u (B, k*C, H, W) at times t (B,).

        The output is (B, shapes.output_channels, H, W) in fp32. Its meaning depends on `config.prediction`.
        """
        inputs = u
        if self.config.center is Center.input:
            inputs = u + self.diffusion.initial_state(conditioning.x_hat)
        feature = self.diffusion.schedule.time_feature(t).to(u.device, torch.float32)
        return self.refiner(inputs, feature, self.build_condition(conditioning)).float()

    def add_noise(self, x: torch.Tensor, conditioning: Conditioning, noise_sample: NoiseSample) -> torch.Tensor:
        """Return the noisy states u_t (B, k*C, H, W) of images x (B, C, H, W)."""
        u0 = self.diffusion.initial_state(self.to_state(x, conditioning), noise_sample.aux_noise)
        return self.diffusion.perturb(u0, noise_sample.t, noise_sample.eps)

    def forward(self, x: torch.Tensor, conditioning: Conditioning, noise_sample: NoiseSample) -> torch.Tensor:
        """Return the loss of each sample, (B,): the weighted mean squared error of the predicted quantity."""
        conditioning = conditioning.drop(noise_sample.keep)
        if noise_sample.keep_label is not None:
            conditioning = conditioning.drop_label(noise_sample.keep_label)
        if noise_sample.keep_pca is not None:
            conditioning = conditioning.drop_pca(noise_sample.keep_pca)
        u = self.add_noise(x, conditioning, noise_sample)
        error = self.network_output(u, noise_sample.t, conditioning) - self._target(x, u, conditioning, noise_sample)
        weighted = error if noise_sample.weight is None else apply_matrix(noise_sample.weight, error)
        return (error * weighted).flatten(1).mean(1)

    def _target(
        self, x: torch.Tensor, u: torch.Tensor, conditioning: Conditioning, noise_sample: NoiseSample
    ) -> torch.Tensor:
        """Return the training target of the refiner for u, (B, shapes.output_channels, H, W)."""
        match self.config.prediction:
            case PredictionType.eps:
                eps = (
                    noise_sample.eps - self.diffusion.eps_for_normal_data(u, noise_sample.t)
                    if self.config.mixed
                    else noise_sample.eps
                )
                return self._predicted(eps)
            case PredictionType.x0:
                return self.to_state(x, conditioning)
            case PredictionType.v:  # v = alpha eps - sigma x0
                alpha, sigma = self._scales(noise_sample.t, u)
                return alpha * noise_sample.eps - sigma * self.to_state(x, conditioning)

    def _predicted(self, eps: torch.Tensor) -> torch.Tensor:
        """Select the components of eps (B, k*C, H, W) that the refiner predicts."""
        chosen = self.diffusion.predicted_components
        if len(chosen) == self.diffusion.k:
            return eps
        return eps.unflatten(1, (self.diffusion.k, -1))[:, list(chosen)].flatten(1, 2)

    def _scales(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return per_sample(self.diffusion.alpha(t), like), per_sample(self.diffusion.sigma(t), like)

    def predict(
        self, u: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (eps (B, k*C, H, W), y_0 (B, C, H, W)) for states u (B, k*C, H, W) at times t (B,)."""
        output = self.network_output(u, t, conditioning)
        if self.config.prediction is PredictionType.x0:
            return self.diffusion.eps_from_x0(u, t, output), output
        if self.config.prediction is PredictionType.v:
            alpha, sigma = self._scales(t, u)
            return sigma * u + alpha * output, alpha * u - sigma * output
        if self.config.mixed:
            output = output + self._predicted(self.diffusion.eps_for_normal_data(u, t))
        eps = self.diffusion.project_eps(u, t, self.diffusion.complete_eps(u, t, output))
        return eps, self.diffusion.x0_from_eps(u, t, eps)


def _check(config: DenoiserConfig, diffusion: Diffusion, shapes: Shapes) -> None:
    """Raise UserError if a setting is out of range or contradicts another setting."""
    prediction = config.prediction.name
    if config.center is not Center.none and not config.condition_image:
        raise UserError(f"denoiser.center={config.center.name} needs x_hat: set denoiser.condition_image=true")
    for name in ("condition_dropout", "label_dropout", "pca_dropout"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise UserError(f"denoiser.{name}={getattr(config, name)} is not a probability: use 0 to 1")
    size = math.prod(shapes.latent)
    if config.pca_components and not config.condition_latent:
        raise UserError("denoiser.pca_components needs latent guidance: set denoiser.condition_latent=true")
    if not 0 <= config.pca_components <= (size if config.condition_latent else 0):
        raise UserError(f"denoiser.pca_components={config.pca_components}: z has {size} numbers, use 0 to {size}")
    if config.condition_label and not shapes.labels:
        raise UserError("denoiser.condition_label=true needs classes: name them in classes=[...] and set data.label")
    if config.data_scale is not None and config.data_scale <= 0:
        raise UserError(f"denoiser.data_scale={config.data_scale} must be above 0, or null to measure it")
    if diffusion.k != 1 and config.prediction is not PredictionType.eps:
        raise UserError(f"denoiser.prediction={prediction} is defined for k = 1 only: use eps")
    if diffusion.schedule.zero_terminal_snr and config.prediction is PredictionType.eps:
        raise UserError(
            "denoiser.prediction=eps does not determine the image at t = 1 of this schedule, because B is infinite "
            "there: use v or x0"
        )
    if config.mixed and config.prediction is not PredictionType.eps:
        raise UserError(f"denoiser.mixed=true is defined for eps, not {prediction}: set denoiser.mixed=false")
