"""Classifiers: networks that tell the class of an image from its noisy state; their gradient guides samplers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from dvae.registry.core import ComponentConfig, Registry, Shapes
from dvae.registry.refiners.base import ConditionalNetwork, NetworkCondition


class Classifier(ConditionalNetwork, ABC):
    """p(class | u_t), as logits."""

    Config: type[ComponentConfig]

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None:
        super().__init__(shapes)

    @abstractmethod
    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        """Logits (B, shapes.labels), fp32, of u (B, k*C, H, W) at t_feature (B,) in [0, 1000].

        Of the condition, the class is not looked at.
        """


CLASSIFIERS: Registry[Classifier] = Registry("classifier", __package__, Classifier, optional=True)
