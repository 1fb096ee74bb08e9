"""The autoencoder of latent diffusion: squared error, a KL term of small weight, and a patch discriminator."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dvae.errors import UserError
from dvae.layers.adversarial import GanLoss, PatchDiscriminator, check_discriminator
from dvae.layers.attention import AttentionBackend
from dvae.layers.autoencoder import Autoencoder, AutoencoderConfig
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.encoders.base import ENCODERS, Adversary, Encoder, Posterior, squared_error, vae_terms


@ENCODERS.register("kl_gan")
class KLGAN(Encoder):
    """Autoencoder with a latent map, trained with a discriminator (Esser et al. 2021; Rombach et al. 2022).

    This encoder uses the squared error, but the papers use |x - x_hat| and a perceptual distance. So the default
    weights of the loss terms are not from a paper. With discriminator_weight=0 there is no discriminator.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        channels: list[int] = field(default_factory=lambda: [64, 128, 256])
        """Channels at each resolution. Each resolution is half the one before: three reduce height and width by 4."""
        blocks: int = 1
        """Residual blocks of the encoder at each resolution. The decoder has one more at each."""
        latent_channels: int = 4
        """Number of channels of the latent map."""
        groups: int = 32
        """Number of groups of GroupNorm; must divide every entry of `channels`."""
        middle_attention: bool = True
        """Whether there is self-attention over the pixels of the coarsest map."""
        attention: AttentionBackend = AttentionBackend.auto
        """Implementation that computes attention."""
        kl_weight: float = 1e-6
        """Weight of KL(q(z|x) || N(0, I)); 0 or more. The squared error, summed over pixels in [0, 1], has weight 1."""
        discriminator_weight: float = 0.5
        """Weight of the adversarial loss (0: no GAN).

        It is multiplied by the adaptive weight: |gradient of the reconstruction error| divided by |gradient of the
        adversarial loss|, both at the last layer.
        """
        discriminator_start: int = 50_000
        """Number of steps before the training of the discriminator starts."""
        discriminator_warmup: int = 0
        """Number of steps, after `discriminator_start`, in which only the discriminator is trained.

        The gradients of an untrained discriminator would harm the decoder.
        """
        discriminator_width: int = 64
        """Channels of the first layer of the discriminator; a multiple of 8."""
        discriminator_layers: int = 3
        """Number of stride-2 convolutions of the discriminator. 1, 2, 3: it classifies patches of 16, 34, 70 px."""
        discriminator_lr: float = 1.0
        """Learning rate of the discriminator, as a multiple of the learning rate of the encoder; above 0."""
        gan_loss: GanLoss = GanLoss.hinge
        """Loss functions of the discriminator and of the decoder."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if config.discriminator_lr <= 0:
            raise UserError(f"encoder.discriminator_lr {config.discriminator_lr}: use a multiple above 0")
        for name in ("kl_weight", "discriminator_weight", "discriminator_start", "discriminator_warmup"):
            if getattr(config, name) < 0:
                raise UserError(f"encoder.{name} {getattr(config, name)}: use 0 or more")
        if config.discriminator_weight:
            check_discriminator(config.discriminator_width, config.discriminator_layers, shapes.image_size)
        plan = AutoencoderConfig(
            colors=shapes.channels,
            channels=config.channels,
            blocks=config.blocks,
            latent_channels=config.latent_channels,
            groups=config.groups,
            middle_attention=config.middle_attention,
            attention=config.attention,
        )
        self.config, self.shapes = config, shapes
        self.latent_shape = plan.latent_shape(shapes.image_size)
        self.autoencoder = Autoencoder(plan)

    def encode(self, x: torch.Tensor) -> Posterior:
        """Return the posterior q(z | x) of images x (B, C, H, W) in [-1, 1].

        Its mean and logvar have shape (B, latent_channels, h, w) and dtype fp32.
        """
        return Posterior(*self.autoencoder.moments(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return x_hat (B, C, H, W), in [-1, 1], fp32, of latents z (B, latent_channels, h, w)."""
        return self.autoencoder.last_layer(self.autoencoder.features(z)).float().clamp(-1.0, 1.0)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the objective, see `Encoder.forward`.

        The terms are "loss", "reconstruction" (sum of (x - x_hat)^2 in [0, 1] units) and "kl" (nats), each (B,).
        "x_hat" is not clamped to [-1, 1], so that every pixel has a gradient.
        """
        posterior = self.encode(x)
        z = posterior.sample(noise)
        features = self.autoencoder.features(z)
        x_hat = self.autoencoder.last_layer(features).float()
        terms = vae_terms(squared_error(x, x_hat), posterior.kl(), self.config.kl_weight)
        drawn = {"z": z, "x_hat": x_hat}
        return terms | drawn if self.config.discriminator_weight == 0 else terms | drawn | {"features": features}

    def adversary(self) -> Adversary | None:
        config = self.config
        if config.discriminator_weight == 0:
            return None
        return Adversary(
            discriminator=PatchDiscriminator(
                self.shapes.channels, config.discriminator_width, config.discriminator_layers
            ),
            loss=config.gan_loss,
            weight=config.discriminator_weight,
            start=config.discriminator_start,
            warmup=config.discriminator_warmup,
            lr=config.discriminator_lr,
            last_layer=self.autoencoder.last_layer,
            distance=squared_error,
        )
