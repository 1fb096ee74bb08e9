"""A patch discriminator, GAN losses, and the adaptive weight that balances them with the reconstruction error."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight

from dvae.errors import UserError
from dvae.layers.norms import GroupNorm

LARGEST_WEIGHT = 1e4
"""Upper bound of the adaptive weight (from the public code of Esser et al. 2021)."""


class GanLoss(Enum):
    """The losses of the discriminator and the generator, as functions of the logits l. A high logit means "real"."""

    hinge = "hinge"
    """Discriminator: max(0, 1 - l(real)) / 2 + max(0, 1 + l(fake)) / 2. Generator: -l(fake). Lim & Ye (2017)."""
    non_saturating = "non_saturating"
    """Discriminator: -log sigmoid(l(real)) / 2 - log sigmoid(-l(fake)) / 2. Generator: -log sigmoid(l(fake)).
    Goodfellow et al. (2014)."""


def discriminator_loss(kind: GanLoss, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return the elementwise loss of the discriminator for logits of any shape. Both shapes must be equal."""
    if kind is GanLoss.hinge:
        return 0.5 * (F.relu(1.0 - real) + F.relu(1.0 + fake))
    return 0.5 * (F.softplus(-real) + F.softplus(fake))


def generator_loss(kind: GanLoss, fake: torch.Tensor) -> torch.Tensor:
    """Return the elementwise loss of the generator for logits of any shape."""
    return -fake if kind is GanLoss.hinge else F.softplus(-fake)


class PatchDiscriminator(nn.Module):
    """Map images (B, C, H, W) to logits (B, 1, h, w), one for each patch. A high logit means "real".

    Isola et al. (2017), section 3.2: 4x4 convolutions and LeakyReLU with slope 0.2. GroupNorm replaces BatchNorm, so
    the logits of an image do not depend on the rest of the batch or on how the batch is distributed over ranks.
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
    """Raise UserError if the settings are invalid, or if the images are too small for `layers` halvings."""
    if width < 8 or width % 8 or layers < 1:
        raise UserError(
            f"encoder.discriminator_width {width}, encoder.discriminator_layers {layers}: use a multiple of 8, and 1 "
            "or more layers"
        )
    # The two 4x4 convolutions with stride 1 and padding 1 each make the map one pixel smaller.
    if image_size // 2**layers < 3:
        raise UserError(f"encoder.discriminator_layers {layers} leave no patch of images of {image_size} px: use fewer")


def weight_gradient(layer: nn.Conv2d, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the weight of `layer`, fp32, from its inputs (B, C, H, W) and the gradient at its outputs.

    The weight itself is not read, because at ZeRO stage 3 it may be on other ranks.
    """
    height, width = layer.kernel_size
    shape = (layer.out_channels, layer.in_channels, height, width)
    stride, padding = (layer.stride[0], layer.stride[1]), (int(layer.padding[0]), int(layer.padding[1]))
    return conv2d_weight(inputs.float(), shape, gradient.float(), stride, padding)


def adaptive_weight(
    layer: nn.Conv2d, inputs: torch.Tensor, reconstruction: torch.Tensor, adversarial: torch.Tensor
) -> torch.Tensor:
    """Return the adaptive weight of the adversarial loss (Esser et al. 2021, eq. 7), at most 1e4.

    It is |gradient of the reconstruction error| / (|gradient of the adversarial loss| + 1e-4). Both gradients are taken
    with respect to the weight of `layer`, the last layer of the decoder.

    Args:
        layer: The last convolution of the decoder.
        inputs: Its inputs (B, C, H, W).
        reconstruction: The gradient of the reconstruction error at the outputs of the layer, (B, C, H, W).
        adversarial: The gradient of the adversarial loss at the outputs of the layer, (B, C, H, W).
    """
    wanted = weight_gradient(layer, inputs, reconstruction).norm()
    present = weight_gradient(layer, inputs, adversarial).norm()
    return (wanted / (present + 1e-4)).clamp(max=LARGEST_WEIGHT)
