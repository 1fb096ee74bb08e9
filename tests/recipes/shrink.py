"""Components and runs so small that every recipe can be trained on a CPU in about a second."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from dvae.registry.stages.base import training_fields

SIZE = 16
"""Height and width of the images."""
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "source": {"avatars": {"n": 24}, "mnist_5k": {"name": "avatars", "n": 24}},
    "encoder": {
        "conv_vae": {
            "resolutions": [SIZE, 8, 1], "channels": [16, 16, 16], "encoder_blocks": [1, 1, 1],
            "decoder_blocks": [1, 1, 1], "latent_dim": 8, "patch": 1,
        },
        "simple_vae": {"channels": [8, 8], "latent_dim": 8},
        "kl_gan": {
            "channels": [8, 8, 8], "blocks": 1, "groups": 4, "discriminator_width": 8, "discriminator_layers": 2,
            "discriminator_start": 1,
        },
        "diffusers_kl": {"block_out_channels": [8, 16], "norm_num_groups": 4},
    },
    "prior": {"gmm": {"components": 2}},
    "refiner": {
        "unet": {
            "width": 32, "multipliers": [1, 2], "blocks": 1, "heads": 4, "attention_resolutions": [], "patch": 1,
        },
        "simple_unet": {"width": 32, "multipliers": [1, 2], "blocks": 1, "patch": 1},
        "ncsnpp": {"width": 32, "multipliers": [1, 2], "blocks": 1, "attention_resolutions": []},
        "flat_resnet": {"width": 32, "blocks": 1},
        "dit": {"patch": 4, "width": 32, "depth": 1, "heads": 2},
        "mlp": {"width": 16, "blocks": 1, "frequencies": 4},
    },
    "sampler": {"ode": {"tolerance": 0.5}},
    "classifier": {
        "half_unet": {"width": 32, "multipliers": [1], "blocks": 1, "patch": 1},
        "ncsnpp_classifier": {"width": 32, "multipliers": [1], "blocks": 1, "attention_resolutions": []},
    },
}  # fmt: skip
"""By kind and name: fields of a small component, or another in its place. Any other is used as it is."""
TRAINING = {
    "steps": 2, "batch": 2, "micro_batches": 1, "warmup": 1, "log_every": 1, "save_every": 2, "preview_every": 0,
}  # fmt: skip


def small(kind: str, name: str) -> dict[str, Any]:
    """The node of a small component of this name."""
    return {"name": name, **SMALL.get(kind, {}).get(name, {})}


def shrink(config: DictConfig) -> DictConfig:
    """A recipe with the components and choices that it has, and small in everything that takes time."""
    plain: Any = OmegaConf.to_container(config, enum_to_str=True)
    for kind, sizes in SMALL.items():
        if plain[kind] is not None:
            plain[kind] |= sizes.get(plain[kind]["name"], {})
    plain["image_size"] = min(SIZE, plain["image_size"])
    plain["sampler"]["steps"] = 2
    plain["data"] |= {"heldout_fraction": 0.4, "workers": 1}
    plain["evaluate"] |= {"n": 2, "batch": 4, "seeds": [0], "metrics": False}
    for stage in training_fields():
        plain[stage] |= TRAINING
    return OmegaConf.create(plain)
