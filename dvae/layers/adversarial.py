"""A patch discriminator, the losses of a GAN, and the weight that balances them with a reconstruction error."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight

from dvae.errors import UserError
from dvae.layers.norms import GroupNorm

LARGEST_WEIGHT = 1e4
"""The adaptive weight goes no higher (Esser et al. 2021, public code)."""


class GanLoss(Enum):
    """What discriminator and generator minimize, in logits l that are high where an image is taken for real."""

    hinge = "hinge"
    """max(0, 1 - l(real)) / 2 + max(0, 1 + l(fake)) / 2 against -l(fake) (Lim & Ye 2017)."""
    non_saturating = "non_saturating"
    """-log sigmoid(l(real)) / 2 - log sigmoid(-l(fake)) / 2 against -log sigmoid(l(fake)) (Goodfellow et al. 2014)."""


def discriminator_loss(kind: GanLoss, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Logits of any shape, equal for both, to the loss of each."""
    if kind is GanLoss.hinge:
        return 0.5 * (F.relu(1.0 - real) + F.relu(1.0 + fake))
    return 0.5 * (F.softplus(-real) + F.softplus(fake))


def generator_loss(kind: GanLoss, fake: torch.Tensor) -> torch.Tensor:
    """Logits of any shape to the loss of each."""
    return -fake if kind is GanLoss.hinge else F.softplus(-fake)


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) to logits (B, 1, h, w), one for each patch; high where it is taken for real.

    Isola et al. (2017), section 3.2: 4x4 convolutions, LeakyReLU 0.2. Normalization is by groups instead of by batch,
    so that the verdict on an image does not depend on its neighbors, nor on how a batch is spread over ranks.
    """

    def __init__(self, colors: int, width: int, layers: int) -> None:
        super().__init__()
        widths = [width * min(2**level, 8) for level in range(layers + 1)]
        stages: list[nn.Module] = [nn.Conv2d(colors, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            stages += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                GroupNorm(widths[level], groups=8),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*stages, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).float()


def check_discriminator(width: int, layers: int, image_size: int) -> None:
    """Raise UserError where a discriminator of `layers` halvings does not fit the images."""
    if width < 8 or width % 8 or layers < 1:
        raise UserError(
            f"encoder.discriminator_width {width}, encoder.discriminator_layers {layers}: use a multiple of 8, and 1 "
            "or more layers"
        )
    if image_size // 2**layers < 3:  # two 4x4 convolutions with padding 1 take a pixel off each
        raise UserError(f"encoder.discriminator_layers {layers} leave no patch of images of {image_size} px: use fewer")


def weight_gradient(layer: nn.Conv2d, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of `layer`'s weight, fp32, given its inputs (B, C, H, W) and the gradient at its outputs.

    The weight itself is not looked at, which may lie on other ranks (ZeRO stage 3).
    """
    height, width = layer.kernel_size
    shape = (layer.out_channels, layer.in_channels, height, width)
    stride, padding = (layer.stride[0], layer.stride[1]), (int(layer.padding[0]), int(layer.padding[1]))
    return conv2d_weight(inputs.float(), shape, gradient.float(), stride, padding)


def adaptive_weight(
    layer: nn.Conv2d, inputs: torch.Tensor, reconstruction: torch.Tensor, adversarial: torch.Tensor
) -> torch.Tensor:
    """|grad of the reconstruction error| / (|grad of the adversarial loss| + 1e-4) at the weight of the last `layer`.

    Both are given as gradients at the layer's outputs (B, C, H, W). Esser et al. (2021), eq. 7; at most 1e4.
    """
    wanted = weight_gradient(layer, inputs, reconstruction).norm()
    present = weight_gradient(layer, inputs, adversarial).norm()
    return (wanted / (present + 1e-4)).clamp(max=LARGEST_WEIGHT)
