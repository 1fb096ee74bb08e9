"""Classifiers: networks that predict the class of an image from its noisy state.

Samplers use their gradient for classifier guidance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from dvae.registry.core import ComponentConfig, Registry, Shapes
from dvae.registry.refiners.base import ConditionalNetwork, NetworkCondition


class Classifier(ConditionalNetwork, ABC):
    """Base class of classifiers. A classifier computes p(class | u_t) as logits."""

    Config: type[ComponentConfig]

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None:
        super().__init__(shapes)

    @abstractmethod
    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        """Compute the logits of the classes.

        Args:
            u: Noisy state (B, k*C, H, W).
            t_feature: Time (B,) in [0, 1000].
            condition: Conditions of the network. The label in it is ignored.

        Returns:
            Logits (B, shapes.labels), fp32.
        """


CLASSIFIERS: Registry[Classifier] = Registry("classifier", __package__, Classifier, optional=True)
