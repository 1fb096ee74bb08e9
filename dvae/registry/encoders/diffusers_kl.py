"""A pretrained autoencoder, read from a folder in the format of diffusers' AutoencoderKL."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from dvae.errors import UserError, fold
from dvae.layers.attention import AttentionBackend
from dvae.layers.autoencoder import Autoencoder, AutoencoderConfig
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.encoders.base import ENCODERS, Encoder, Posterior, squared_error
from dvae.utils.read import DamagedFile, read_json, read_weights_header
from dvae.utils.weights import load_weights

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FIXED: dict[str, Any] = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
"""Entries of config.json for which this encoder supports one value only."""
OURS = ("name", "folder", "attention")
"""Fields of the Config that are not entries of config.json."""
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Old name -> current name of the attention layers. Files of 2022 and 2023 have the old names."""


@ENCODERS.register("diffusers_kl")
class DiffusersKL(Encoder):
    """The autoencoder of latent diffusion (Rombach et al. 2022) with given weights; z has about unit variance.

    The encoder stage reads the weights from the folder and does not train. Afterwards the run and its bundle contain
    the weights, and the folder is not needed. The fields have the names and meanings of the entries in config.json.
    If config.json differs from the fields, an error names the settings to add.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        folder: str = field(default="", metadata={"place": True})
        """Folder of config.json and diffusion_pytorch_model.safetensors. Only the encoder stage reads it."""
        block_out_channels: list[int] = field(default_factory=lambda: [64])
        """Channels at each resolution. The first is at the resolution of the images, each further one at half."""
        layers_per_block: int = 1
        """Residual blocks of the encoder at each resolution. The decoder has one more at each."""
        latent_channels: int = 4
        """Number of channels of the latent map."""
        norm_num_groups: int = 32
        """Number of groups of GroupNorm; must divide every entry of `block_out_channels`."""
        mid_block_add_attention: bool = True
        """Whether there is self-attention over the pixels of the coarsest map."""
        use_quant_conv: bool = True
        """Whether a 1x1 convolution follows the encoder."""
        use_post_quant_conv: bool = True
        """Whether a 1x1 convolution precedes the decoder."""
        scaling_factor: float = 0.18215
        """Factor on the latents of the network, after `shift_factor` is subtracted; above 0."""
        shift_factor: float = 0.0
        """Value that is subtracted from the latents of the network."""
        attention: AttentionBackend = AttentionBackend.auto
        """Implementation that computes attention."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if config.scaling_factor <= 0:
            raise UserError(f"encoder.scaling_factor {config.scaling_factor} is not above 0: use the value in {CONFIG}")
        plan = AutoencoderConfig(
            colors=shapes.channels,
            channels=config.block_out_channels,
            blocks=config.layers_per_block,
            latent_channels=config.latent_channels,
            groups=config.norm_num_groups,
            middle_attention=config.mid_block_add_attention,
            attention=config.attention,
            quant_conv=config.use_quant_conv,
            post_quant_conv=config.use_post_quant_conv,
        )
        self.config, self.shapes = config, shapes
        self.latent_shape = plan.latent_shape(shapes.image_size)
        self.autoencoder = Autoencoder(plan)

    def encode(self, x: torch.Tensor) -> Posterior:
        """Return the posterior q(z | x) of images x (B, C, H, W) in [-1, 1].

        Its mean and logvar have shape (B, latent_channels, h, w) and dtype fp32.
        """
        mean, logvar = self.autoencoder.moments(x)
        scale = self.config.scaling_factor
        return Posterior((mean - self.config.shift_factor) * scale, logvar + 2.0 * math.log(scale))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return x_hat (B, C, H, W), in [-1, 1], fp32, of latents z (B, latent_channels, h, w)."""
        return self._decode(z).clamp(-1.0, 1.0)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return "loss" (B,), fp32: the sum of (x - x_hat)^2 over pixels in [0, 1] units, with "z" and "x_hat".

        The encoder stage does not call this method, because it does not train this encoder.
        """
        z = self.encode(x).sample(noise)
        x_hat = self._decode(z)
        return {"loss": squared_error(x, x_hat), "z": z, "x_hat": x_hat}

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        z = z / self.config.scaling_factor + self.config.shift_factor
        return self.autoencoder.last_layer(self.autoencoder.features(z)).float()

    def pretrained(self) -> dict[str, torch.Tensor]:
        """Return the weights of the folder. Raises UserError if it cannot be read or holds another network."""
        if not self.config.folder:
            raise UserError(f"encoder.folder is not set: give the folder that holds {CONFIG} and {WEIGHTS}")
        folder = Path(self.config.folder)
        self._compare(folder / CONFIG)
        path = folder / WEIGHTS
        own = self.state_dict()
        try:
            held = {_full_name(name): tensor.shape for name, tensor in read_weights_header(path).items()}
            wrong = sorted(own.keys() ^ held.keys())
            wrong += [name for name in sorted(own.keys() & held.keys()) if own[name].shape != held[name]]
            if wrong:  # checked with the header only, before memory is allocated for the weights
                raise UserError(
                    f"{path} does not hold the network of {CONFIG} beside it (see {wrong[0]!r}): copy it again"
                )
        except (OSError, DamagedFile) as error:
            reason = fold(error).removeprefix(f"{path}: ")
            raise UserError(f"{path}: not a readable weights file ({reason})") from None
        return {_full_name(name): value.float() for name, value in load_weights(path).items()}

    def _compare(self, path: Path) -> None:
        """Raise UserError if config.json is damaged, or describes another network than the fields do."""
        try:
            stored = read_json(path, dict[str, Any])
        except (OSError, DamagedFile) as error:
            reason = fold(error).removeprefix(f"{path}: ")
            raise UserError(f"{path}: not a readable {CONFIG} of an AutoencoderKL ({reason})") from None
        colors = {"in_channels": self.shapes.channels, "out_channels": self.shapes.channels}
        for name, value in (FIXED | colors).items():
            if stored.get(name, value) != value:
                raise UserError(f"{path}: {name} is {str(stored[name])[:80]}, this encoder supports only {value}")
        words = []
        for name, default in self._described().items():
            value = stored.get(name, default)  # an entry that the file lacks has diffusers' default
            value = 0.0 if name == "shift_factor" and value is None else value
            if value != getattr(self.config, name):
                words.append(f"encoder.{name}={json.dumps(value, separators=(',', ':'))[:200]}")
        if words:
            raise UserError(f"{path} describes another network than the config: add {' '.join(words)}")

    def _described(self) -> dict[str, Any]:
        """Return the fields that are also entries of config.json, with their defaults."""
        default = self.Config()
        return {f.name: getattr(default, f.name) for f in fields(default) if f.name not in OURS}


def _full_name(name: str) -> str:
    """Return the name of a tensor in this encoder, from its name in the file. The file may use old names."""
    parts = [OLD_NAMES.get(part, part) if "attentions" in name else part for part in name.split(".")]
    return ".".join(["autoencoder", *parts])
