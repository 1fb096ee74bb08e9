"""Build the components of a run from its config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from dvae.config.schema import ModelConfig, RunConfig
from dvae.diffusion.denoiser import Denoiser, DenoiserConfig, Space
from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.time_grid import Spacing
from dvae.errors import UserError, fold
from dvae.registry.classifiers.base import CLASSIFIERS, Classifier
from dvae.registry.core import Shapes
from dvae.registry.encoders.base import ENCODERS, Encoder
from dvae.registry.priors.base import PRIORS, Prior
from dvae.registry.processes.base import PROCESSES
from dvae.registry.refiners.base import REFINERS
from dvae.registry.samplers.base import SAMPLERS, Sampler
from dvae.registry.schedules.base import SCHEDULES

MAX_LAYERS = 100_000
"""Most layers, parameters and buffers in the networks of a run. The largest published networks have some thousand."""


@dataclass(frozen=True)
class RunModels:
    """The models of a run, and the shapes that they share.

    The denoiser contains the refiner and the diffusion process. The classifier is optional.
    """

    encoder: Encoder
    prior: Prior
    denoiser: Denoiser
    sampler: Sampler
    shapes: Shapes
    """Shapes of the images and of z.

    `denoiser.shapes` has the shapes of the diffused state, which differ if the diffusion is in latent space.
    """
    classifier: Classifier | None = None

    @property
    def latent_space(self) -> bool:
        """Whether the diffusion runs on the latent of the encoder instead of the image."""
        return self.denoiser.config.space is Space.latent

    @property
    def has_generator(self) -> bool:
        """Whether the encoder generates images before the refinement: x_hat of a sample z of the prior."""
        return "encoder" in self.trained_parts() and not self.latent_space

    def trained_parts(self) -> dict[str, nn.Module]:
        """Return the parts that have weights or fitted values, by their names in a bundle."""
        parts: dict[str, nn.Module] = {"encoder": self.encoder, "prior": self.prior, "denoiser": self.denoiser}
        if self.classifier is not None:
            parts["classifier"] = self.classifier
        return {name: part for name, part in parts.items() if part.state_dict()}

    def parameters(self) -> dict[str, int]:
        """Return the number of parameters by the stage that trains them."""
        stages: dict[str, nn.Module] = {"encoder": self.encoder, "refiner": self.denoiser}
        if self.classifier is not None:
            stages["classifier"] = self.classifier
        return {stage: sum(p.numel() for p in module.parameters()) for stage, module in stages.items()}


def build_models(config: RunConfig | ModelConfig, seed_weights: bool = True) -> RunModels:
    """Build all components of `config`.

    Raises UserError if the components do not fit each other.

    Args:
        config: Config of the run or of the model.
        seed_weights: Seed PyTorch's generator with the run's seed, so that the initial weights do not depend on random
            numbers that were drawn before. The earlier state of the generator is restored afterwards.
    """
    shapes = Shapes(image_size=config.image_size, channels=config.channels)
    with torch.random.fork_rng(devices=[], enabled=seed_weights):
        torch.manual_seed(config.seed)
        encoder = ENCODERS.build(config.encoder, shapes)
        diffusion = Diffusion(
            PROCESSES.build(config.process, shapes),
            SCHEDULES.build(config.schedule, shapes),
            matching=config.denoiser.matching,
            factor=config.denoiser.factor,
        )
        shapes = replace(shapes, latent=encoder.latent_shape, labels=len(config.classes))
        prior = PRIORS.build(config.prior, shapes)
        if config.denoiser.space is Space.latent:
            _check_latent_space(config, shapes, prior)
        state = _state_shapes(config.denoiser, diffusion, shapes)
        refiner_shapes = state if config.denoiser.condition_label else replace(state, labels=0)
        refiner = REFINERS.build(config.refiner, refiner_shapes)
        denoiser = Denoiser(refiner, diffusion, config.denoiser, state)
        classifier = None if config.classifier is None else CLASSIFIERS.build(config.classifier, state)
        sampler = build_sampler(config.sampler, diffusion, state)
    return RunModels(encoder, prior, denoiser, sampler, shapes, classifier)


def _state_shapes(denoiser: DenoiserConfig, diffusion: Diffusion, shapes: Shapes) -> Shapes:
    """Return the shapes of the diffused state, for the networks that process it.

    The state has the shape of the images, or of the encoder's latent maps for denoiser.space=latent.
    """
    if denoiser.space is Space.latent:
        shapes = replace(shapes, channels=shapes.latent[0], image_size=shapes.latent[1], latent=())
    return replace(
        shapes,
        k=diffusion.k,
        outputs=len(diffusion.predicted_components),
        condition_channels=shapes.channels if denoiser.condition_image else 0,
        condition_latent=denoiser.condition_latent,
    )


def _check_latent_space(config: RunConfig | ModelConfig, shapes: Shapes, prior: Prior) -> None:
    """Raise UserError if the latent is not a square map, or if a setting cannot be combined with latent diffusion."""
    if len(shapes.latent) != 3 or shapes.latent[1] != shapes.latent[2]:
        raise UserError(
            f"denoiser.space=latent needs a square latent map, but the latent of encoder={config.encoder.name} is "
            f"{shapes.latent}: use encoder=kl_gan or diffusers_kl"
        )
    for name in ("condition_image", "condition_latent"):
        if getattr(config.denoiser, name):
            raise UserError(f"denoiser.space=latent diffuses the latent itself: set denoiser.{name}=false")
    if prior.state_dict():
        raise UserError(
            f"denoiser.space=latent draws latents by diffusion and does not use prior={config.prior.name}: "
            "set prior=normal and leave prior out of stages=[...]"
        )


def build_sampler(node: object, diffusion: Diffusion, shapes: Shapes) -> Sampler:
    """Build the sampler of `node`.

    Raises UserError if it does not support the process and schedule. The message lists the samplers that do.
    """
    sampler = SAMPLERS.build(node, shapes)
    if not sampler.supports(diffusion):
        name = SAMPLERS.config(node).name
        process, schedule = PROCESSES.name_of(diffusion.process), SCHEDULES.name_of(diffusion.schedule)
        able = [other for other in SAMPLERS.names() if SAMPLERS.build({"name": other}, shapes).supports(diffusion)]
        raise UserError(
            f"sampler={name} does not integrate process={process} on schedule={schedule}: use one of {', '.join(able)}"
        )
    spacing = sampler.config.spacing
    if diffusion.k > 1 and spacing in (Spacing.log_snr, Spacing.karras):
        raise UserError(
            f"sampler.spacing={spacing.name} needs one signal-to-noise ratio, a process with k = {diffusion.k} has "
            "none: use uniform or quadratic"
        )
    return sampler


def build_models_on_meta(config: RunConfig | ModelConfig) -> RunModels:
    """Build all components on the meta device, without memory for their weights.

    This is for checks of the config and for counting parameters. Raises UserError if the components do not fit each
    other, or if no network can be built from the settings.
    """
    with meta_device(MAX_LAYERS):
        return build_models(config, seed_weights=False)


@contextmanager
def meta_device(tensors: int) -> Iterator[None]:
    """Context in which networks are built on the meta device, without memory for their weights.

    The number of layers is limited, because a damaged or hostile config could describe any number of layers, and their
    Python objects need memory on the meta device too.

    Args:
        tensors: Number of tensors in the weights. It sets the limit to 2000 + 10 * tensors, at most MAX_LAYERS.

    Raises UserError if the limit is exceeded or if building the networks fails.
    """
    left = min(2000 + 10 * tensors, MAX_LAYERS)

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError("the settings describe far more layers than a network has: use fewer blocks")

    hooks = [
        register(count)
        for register in (
            torch_module.register_module_module_registration_hook,
            torch_module.register_module_parameter_registration_hook,
            torch_module.register_module_buffer_registration_hook,
        )
    ]
    try:
        with torch.device("meta"):
            yield
    except (ValueError, TypeError, ArithmeticError, LookupError, AssertionError, RuntimeError) as error:
        # the settings may be untrusted, and building layers from them can fail in any way
        raise UserError(f"the settings describe no network that can be built ({fold(error)[:200]})") from None
    finally:
        for hook in hooks:
            hook.remove()
