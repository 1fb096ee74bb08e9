"""The autoencoder of latent diffusion: squared error, a light KL term, and a patch discriminator."""

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
    """Autoencoder with a map as latent, trained against a discriminator (Esser et al. 2021; Rombach et al. 2022).

    The weights below have no published counterpart for squared error; the papers take |x - x_hat| and a perceptual
    distance. With discriminator_weight=0 there is no discriminator.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        channels: list[int] = field(default_factory=lambda: [64, 128, 256])
        """Channels at each resolution, from that of the images down by halves: three reduce height and width by 4."""
        blocks: int = 1
        """Residual blocks of the encoder at each resolution; the decoder has one more."""
        latent_channels: int = 4
        """Channels of the latent map."""
        groups: int = 32
        """Groups of GroupNorm; they divide every entry of `channels`."""
        middle_attention: bool = True
        """Whether the pixels of the coarsest map attend to each other."""
        attention: AttentionBackend = AttentionBackend.auto
        """What computes attention."""
        kl_weight: float = 1e-6
        """Weight of KL(q(z|x) || N(0, I)) against the squared error, both sums, the latter in [0, 1] units."""
        discriminator_weight: float = 0.5
        """Weight of the adversarial loss, times |its gradient| over |the error's| at the last layer (0: no GAN)."""
        discriminator_start: int = 50_000
        """Steps before the discriminator is trained."""
        discriminator_warmup: int = 0
        """Steps in which only the discriminator is trained: untrained, it would only spoil the decoder."""
        discriminator_width: int = 64
        """Channels of the discriminator's first layer; a multiple of 8."""
        discriminator_layers: int = 3
        """Halvings in the discriminator; 1, 2 and 3 judge patches of 16, 34 and 70 px."""
        discriminator_lr: float = 1.0
        """Learning rate of the discriminator, as a multiple of the encoder's."""
        gan_loss: GanLoss = GanLoss.hinge
        """What discriminator and decoder minimize."""

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
        """x (B, C, H, W) in [-1, 1] to q(z | x), mean and logvar (B, latent_channels, h, w) in fp32."""
        return Posterior(*self.autoencoder.moments(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """z (B, latent_channels, h, w) to x_hat (B, C, H, W) in [-1, 1], fp32."""
        return self.autoencoder.last_layer(self.autoencoder.features(z)).float().clamp(-1.0, 1.0)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Per-sample terms (B,), fp32: "loss", "reconstruction" (sum of (x - x_hat)^2 in [0, 1] units), "kl" (nats).

        "x_hat" beside them is not clamped, so that every pixel has a gradient.
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
