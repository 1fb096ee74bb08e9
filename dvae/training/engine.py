"""The engine: DeepSpeed around one trainable module. The only file that imports deepspeed."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dvae.settings import Decay, Precision, TrainingConfig
from dvae.training import ranks
from dvae.training.ema import AdamWEma, ema_decay

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no accelerator

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

TAG = "engine"


def start_distributed() -> None:
    """Join the process group that the environment names (RANK, WORLD_SIZE, ...), or be a group of one."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    ranks.join()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    # on CPUs DeepSpeed compiles this operator, for a minute, and uses it in inference alone
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of step number `step` (from 1): a pure function, so that resuming needs no scheduler state."""
    warm = min(1.0, step / config.warmup) if config.warmup else 1.0
    if config.lr_decay is Decay.constant:
        return config.lr * warm
    progress = min(1.0, max(0.0, (step - config.warmup) / max(1, config.steps - config.warmup)))
    return config.lr * warm * 0.5 * (1.0 + math.cos(math.pi * progress))


class Engine:
    """One module with its optimiser, moving average, precision and ZeRO partition."""

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        self.module = module
        self.config = config
        self.grad_norm = 0.0
        """Global gradient norm of the latest step, before clipping."""
        betas = (config.betas[0], config.betas[1])
        self.optimizer = AdamWEma(module.parameters(), lr=config.lr, betas=betas, weight_decay=config.weight_decay)
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=self._settings(), dist_init_required=False
        )

    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "train_micro_batch_size_per_gpu": config.batch // (ranks.world_size() * config.micro_batches),
            "gradient_accumulation_steps": config.micro_batches,
            "gradient_clipping": config.clip,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {"enabled": config.precision is Precision.bf16, "dtype": "bfloat16"},
            "steps_per_print": 10**9,
        }

    def __call__(self, *args: Any) -> Any:
        return self.deepspeed(*args)

    def backward(self, loss: torch.Tensor) -> None:
        self.deepspeed.backward(loss)

    def step(self, number: int) -> bool:
        """Take step `number` (from 1) once its micro-batches were seen; False where it was left out (non-finite)."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, number)
            group["ema_decay"] = ema_decay(self.config.ema, number)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return True
        if self.config.zero_stage == 0:  # DeepSpeed neither tells the norm there, nor leaves out a non-finite step
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            self.optimizer.overflow = not bool(torch.isfinite(norm))
            self.deepspeed.step()
        else:
            self.deepspeed.step()
            norm = self.deepspeed.get_global_grad_norm()
        self.grad_norm = float(norm)
        return self.deepspeed.was_step_applied()

    def averaged(self) -> dict[str, torch.Tensor]:
        """State dict of the module with the moving average in place of the weights; whole on every rank.

        Every rank takes part.
        """
        state = {name: value.detach().clone() for name, value in self.module.named_buffers()}
        begun = any("ema" in known for known in self.optimizer.state.values())
        for name, parameter in self.module.named_parameters():
            if self.config.zero_stage == 0:
                average = self.optimizer.state.get(parameter, {}).get("ema", parameter)
            else:  # a weight has no average before the first step; at stage 3 its own tensor is an empty placeholder
                average = safe_get_full_optimizer_state(parameter, "ema") if begun else None
                average = safe_get_full_fp32_param(parameter) if average is None else average
            state[name] = average.detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
        return state

    def save(self, folder: Path) -> None:
        """Write this engine's whole state into `folder`; every rank takes part."""
        try:
            self.deepspeed.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        except RuntimeError as error:  # torch's archive writer reports a full disk as one
            if "inline_container" not in str(error):
                raise
            free = shutil.disk_usage(folder).free
            raise OSError(errno.EIO, f"the archive was cut short; {free} bytes are free on this disk") from error

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote; every rank takes part."""
        path, _ = self.deepspeed.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise FileNotFoundError(f"{folder}: no engine state in this checkpoint")

    def close(self) -> None:
        self.deepspeed.destroy()
