"""The diffusion transformer (DiT): attention between the patches of an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.layers.activation_checkpointing import maybe_checkpoint
from dvae.layers.attention import AttentionBackend, attention
from dvae.layers.blocks import zero_module
from dvae.layers.embeddings import grid_positions, mlp, time_features
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition, Refiner

TIME_FEATURES = 256
"""Size of the input of the time embedding."""
EXPANSION = 4
"""Hidden units of a block's MLP, as a multiple of `width`."""


@REFINERS.register("dit")
class DiT(Refiner):
    """Transformer on patches, modulated by time, z and label (adaLN-zero; Peebles & Xie 2023).

    x_hat is concatenated to the input. The embeddings of z and label are added to the time embedding. There are two
    differences from the paper: the time embedding also uses log t, and the network does not predict a variance.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        patch: int = 2
        """Side of a patch, in pixels of the diffused image or latent map. There are (image_size / patch)^2 tokens."""
        width: int = 384
        """Channels of a token, a multiple of `heads` and of 4."""
        depth: int = 12
        """Number of transformer blocks, at least 1."""
        heads: int = 6
        """Number of attention heads."""
        attention: AttentionBackend = AttentionBackend.auto
        """Implementation of attention: auto | sdpa | xformers | math."""
        checkpoint_blocks: bool = False
        """Recompute the activations inside blocks for the gradient instead of keeping them. This needs less memory, but
        a third more computation."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        _check(config, shapes)
        self.config = config
        side, width = shapes.image_size // config.patch, config.width
        self.in_proj = nn.Linear(shapes.input_channels * config.patch**2, width)
        self.positions: torch.Tensor
        self.register_buffer("positions", grid_positions(side, width))
        self.time_embed = mlp(TIME_FEATURES, width)
        self.build_condition_embeddings(width)
        self.blocks = nn.ModuleList(DiTBlock(width, config.heads, config.attention) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out_proj = nn.Linear(width, shapes.output_channels * config.patch**2)
        self._initialize()

    def _initialize(self) -> None:
        """Initialize the weights. The blocks are the identity at first, and the network's output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (*self.time_embed, self.label_emb):
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=0.02)
        zero_module(self.modulate)
        zero_module(self.out_proj)
        for module in self.modules():
            if isinstance(module, DiTBlock):  # gates of zero make each block the identity at first
                zero_module(module.modulate)

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        patches = F.pixel_unshuffle(
            self.concat_condition(u, condition), self.config.patch
        )  # (B, channels * patch^2, h, w)
        tokens = self.in_proj(patches.flatten(2).transpose(1, 2)) + self.positions
        embedding = self.add_condition_embedding(
            self.time_embed(time_features(t_feature, TIME_FEATURES // 2)), condition
        )
        for block in self.blocks:
            tokens = maybe_checkpoint(self.config.checkpoint_blocks, block, tokens, embedding)
        shift, scale = self.modulate(embedding)[:, None].chunk(2, dim=2)
        output = self.out_proj(self.norm(tokens) * (1 + scale) + shift).transpose(1, 2)
        return F.pixel_shuffle(output.unflatten(2, patches.shape[2:]), self.config.patch).to(u.dtype)


class DiTBlock(nn.Module):
    """Attention and an MLP, each with normalization, modulation and a gate.

    It maps tokens (B, L, width) and an embedding (B, width) to tokens (B, L, width).
    """

    def __init__(self, width: int, heads: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        hidden = EXPANSION * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, tokens: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(embedding)[:, None].chunk(6, dim=2)
        tokens = tokens + gate1 * self._attend(self.norm(tokens) * (1 + scale1) + shift1)
        return tokens + gate2 * self.mlp(self.norm(tokens) * (1 + scale2) + shift2)

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).unbind(2)
        return self.project(attention(q, k, v, self.backend).flatten(2))


def _check(config: DiT.Config, shapes: Shapes) -> None:
    """Raise UserError if the settings contradict each other or the image size."""
    if config.patch < 1 or shapes.image_size % config.patch:
        raise UserError(f"refiner.patch {config.patch} does not divide {shapes.image_size} px: use a divisor")
    if config.heads < 1 or config.width < 4 or config.width % config.heads or config.width % 4:
        raise UserError(f"refiner.width {config.width} is not a multiple of 4 and of refiner.heads {config.heads}")
    if config.depth < 1:
        raise UserError(f"refiner.depth {config.depth}: use at least 1 block")
