"""Checkpoints as PyTorch Lightning writes them, with classes in them that are gone by the time they are read."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf


class Callback:
    """Keys Lightning's callback states, as a class."""


class AttributeDict(dict):
    """Lightning's mapping of hyper-parameters."""


class FitLoop:
    def __init__(self) -> None:
        self.progress = {"total": 3}


@contextmanager
def lightning() -> Iterator[None]:
    """The classes above as members of a package pytorch_lightning, which exists inside only."""
    package = types.ModuleType("pytorch_lightning")
    homes = {cls: (cls.__module__, cls.__qualname__) for cls in (Callback, AttributeDict, FitLoop)}
    for cls in homes:
        cls.__module__ = "pytorch_lightning"
        setattr(package, cls.__name__, cls)
    sys.modules["pytorch_lightning"] = package
    try:
        yield
    finally:
        del sys.modules["pytorch_lightning"]
        for cls, (module, name) in homes.items():
            cls.__module__, cls.__qualname__ = module, name


def save(path: Path, state: dict[str, torch.Tensor], hyper_parameters: Any = None) -> Path:
    """Write a checkpoint around `state`, with the rest of what Lightning puts into one."""
    with lightning():
        contents = {
            "epoch": 7,
            "global_step": 1200,
            "pytorch-lightning_version": "1.4.9",
            "state_dict": state,
            "callbacks": {Callback: {"best_model_score": torch.tensor(0.5), "dirpath": Path("checkpoints")}},
            "optimizer_states": [
                {"state": {0: {"step": 3, "exp_avg": torch.randn(4)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
            ],
            "lr_schedulers": [{"base_lrs": [2e-4], "last_epoch": 3, "lr_lambdas": [None]}],
            "loops": {"fit_loop": FitLoop(), "sizes": torch.Size([1, 2]), "devices": {torch.device("cpu")}},
            "score": np.float64(1.5),
            "table": np.arange(3),
            "config": OmegaConf.create({"model": {"name": "unet", "sizes": [1, 2]}}),
        }
        if hyper_parameters is not None:
            contents["hparams_name"] = "kwargs"
            contents["hyper_parameters"] = AttributeDict(hyper_parameters)
        torch.save(contents, path)
    return path


def randomize(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """All parameters small and random, those that start as zero too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        spread = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    return network.eval()
