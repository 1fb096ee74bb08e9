"""The engine: DeepSpeed around one trainable module. The only file that imports deepspeed."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dvae.config.schema import Decay, Precision, TrainingConfig
from dvae.errors import MachineError
from dvae.training.engine.ema import MAIN, AdamWEma, ema_decays
from dvae.training.engine.fragments import (
    STEP,
    WEIGHT,
    EnginePartition,
    Fragment,
    OwnedSlice,
    SavedEngine,
    copy_partition,
    owned_slices,
    persistent_buffers,
)
from dvae.training.engine.memory_estimate import bucket_size
from dvae.training.resilience import ranks


@functools.cache
def _deepspeed() -> ModuleType:
    """DeepSpeed, imported at its first use: it takes a second, and composing a run's settings imports every stage."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no accelerator
    return importlib.import_module("deepspeed")


def start_distributed() -> None:
    """Join the process group that the environment names (RANK, WORLD_SIZE, ...), or be a group of one."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    ranks.join()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    # on CPUs DeepSpeed compiles this operator, for a minute, and uses it in inference alone
    _deepspeed().ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _deepspeed().init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of step number `step` (from 1): a pure function, so that resuming needs no scheduler state."""
    warm = min(1.0, step / config.warmup) if config.warmup else 1.0
    if config.lr_decay is Decay.constant:
        return config.lr * warm
    progress = min(1.0, max(0.0, (step - config.warmup) / max(1, config.steps - config.warmup)))
    return config.lr * warm * 0.5 * (1.0 + math.cos(math.pi * progress))


class Engine:
    """One module with its optimizer, moving average, precision and ZeRO partition."""

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        self.module = module
        self.config = config
        self.parameters = sum(p.numel() for p in module.parameters())
        self.grad_norm = 0.0
        """Global gradient norm of the latest step, before clipping."""
        betas = (config.betas[0], config.betas[1])
        self.optimizer = AdamWEma(module.parameters(), lr=config.lr, betas=betas, weight_decay=config.weight_decay)
        self.deepspeed, *_ = _deepspeed().initialize(
            model=module, optimizer=self.optimizer, config=self._settings(), dist_init_required=False
        )

    def _settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "train_micro_batch_size_per_gpu": config.batch // (ranks.world_size() * config.micro_batches),
            "gradient_accumulation_steps": config.micro_batches,
            "gradient_clipping": config.clip,
            "zero_optimization": self._zero(),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU optimizer would leave the average out
            "torch_autocast": {
                "enabled": config.precision is Precision.bf16,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # whose gradients would be added up over the ranks in bf16
            },
            "steps_per_print": 10**9,
        }

    def _zero(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "stage": self.config.zero_stage,
            "reduce_bucket_size": bucket_size(self.parameters),
            # else stage 3 replaces linear layers, in the whole process, by its own, which round otherwise
            "memory_efficient_linear": False,
        }
        return settings | ({"offload_optimizer": {"device": "cpu"}} if self.config.offload else {})

    def __call__(self, *args: Any) -> Any:
        return self.deepspeed(*args)

    def backward(self, loss: torch.Tensor) -> None:
        self.deepspeed.backward(loss)

    def gradients_finite(self) -> bool:
        """Whether the accumulated gradients are finite, on all ranks. Every rank takes part. Sets `grad_norm`."""
        if self.config.zero_stage == 0:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        elif self.config.zero_stage < 3:
            self.deepspeed.optimizer._wait_for_offload_copies()
            norm = self.deepspeed.optimizer.scaled_global_norm()
        else:
            norm = _deepspeed().runtime.utils.combine_grad_norm_groups(self.deepspeed.optimizer._get_norm_groups())
        self.grad_norm = float(norm)
        return math.isfinite(self.grad_norm)

    def step(self, number: int, finite: bool | None = None) -> bool:
        """Take step `number` (from 1) after its micro-batches. Returns False if the step was skipped.

        A skipped step changes neither weights nor moments nor averages. It is skipped if the gradients of this engine
        are not finite, or if `finite` is False, because those of another engine are not.
        """
        rate, decays = learning_rate(self.config, number), ema_decays(self.config.ema, number)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"], group["ema_decays"] = rate, decays
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return True
        finite = self.gradients_finite() if finite is None else finite
        self.optimizer.overflow = not finite  # at stage 0 DeepSpeed does not look itself
        self.deepspeed.step()
        return finite

    def gradient_norms(self) -> dict[str, float]:
        """Gradient norm of each parameter of the step that is due, over all ranks; every rank takes part."""
        norms = {}
        for name, parameter in self.module.named_parameters():
            if self.config.zero_stage == 0:
                gradient = parameter.grad
            elif self.config.zero_stage < 3:  # its own .grad is this rank's alone
                gradient = parameter.get_full_hp_grad()  # type: ignore[attr-defined]
            else:
                gradient = _deepspeed().utils.safe_get_full_grad(parameter)
            if gradient is not None:
                norms[name] = float(torch.linalg.vector_norm(gradient.float()))
        return norms

    def weights(self) -> dict[str, torch.Tensor]:
        """State dict of the module as it is, whole on every rank; every rank takes part."""
        state = {name: value.detach().clone() for name, value in persistent_buffers(self.module).items()}
        for name, parameter in self.module.named_parameters():
            full = _deepspeed().utils.safe_get_full_fp32_param(parameter) if self.config.zero_stage == 3 else parameter
            state[name] = full.detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
        return state

    def averaged_weights(self, ema: str = MAIN) -> dict[str, torch.Tensor]:
        """State dict of the module with the average `ema` (of ema_names) in place of the weights; whole on every rank.

        Every rank takes part.
        """
        state = {name: value.detach().clone() for name, value in self.module.named_buffers()}
        started = any(ema in state for state in self.optimizer.state.values())
        for name, parameter in self.module.named_parameters():
            if self.config.zero_stage == 0:
                average = self.optimizer.state.get(parameter, {}).get(ema, parameter)
            else:  # a weight has no average before the first step; at stage 3 its own tensor is an empty placeholder
                average = _deepspeed().utils.safe_get_full_optimizer_state(parameter, ema) if started else None
                average = _deepspeed().utils.safe_get_full_fp32_param(parameter) if average is None else average
            state[name] = average.detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
        return state

    def snapshot(self) -> EnginePartition:
        """This rank's partition of the engine's state, copied to the host. Training may go on while it is written."""
        stage = self.config.zero_stage
        fragments = [
            fragment
            for number, fragment in enumerate(self._fragments())
            if stage or number % ranks.world_size() == ranks.rank()  # at stage 0 all hold all
        ]
        return copy_partition(fragments, persistent_buffers(self.module) if ranks.rank() == 0 else {})

    def load(self, folder: Path) -> None:
        """Load the state in `folder`, whatever number of ranks and ZeRO stage wrote it. Every rank takes part.

        Raises MachineError if the files are damaged, or belong to another model.
        """
        saved = SavedEngine(folder)
        parameters = {name for name, _ in self.module.named_parameters()}
        for name in sorted(parameters ^ saved.shapes.keys()):
            raise MachineError(f"{folder}: {name!r} is not in both the checkpoint and the model: another version's?")
        own_buffers, saved_buffers = persistent_buffers(self.module), saved.buffers()
        for name in sorted(own_buffers.keys() - saved_buffers.keys()):
            raise MachineError(f"{folder}: {name!r} is not in the checkpoint: another version's?")
        shapes = saved.shapes | {name: tuple(value.shape) for name, value in saved_buffers.items()}
        for name, value in [*self.module.named_parameters(), *own_buffers.items()]:
            shape = tuple(getattr(value, "ds_shape", value.shape))
            if shapes[name] != shape:
                raise MachineError(f"{folder}: {name!r} is {shapes[name]} in the checkpoint, {shape} in the model")
        self._allocate_states(saved)
        for fragment in self._fragments():
            for kind, values in fragment.values.items():
                values.copy_(saved.read(kind, fragment.name, fragment.start, values.numel()))
        if self.config.zero_stage:
            self._sync_weights(saved)
        for name, buffer in own_buffers.items():
            buffer.copy_(saved_buffers[name])

    def _owned(self) -> Iterator[OwnedSlice]:
        return owned_slices(self.module, self.deepspeed.optimizer, self.config.zero_stage, ranks.rank())

    def _fragments(self) -> Iterator[Fragment]:
        """Views of all values that this rank owns."""
        for name, parameter, flat, offset, start, count in self._owned():
            state = self.optimizer.state.get(flat, {})
            states = {kind: value for kind, value in state.items() if kind != STEP} | {WEIGHT: flat}
            values = {kind: value.detach().view(-1).narrow(0, offset, count) for kind, value in states.items()}
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            yield Fragment(name, shape, start, values, int(state.get(STEP, 0)))

    def _allocate_states(self, saved: SavedEngine) -> None:
        """Allocate the optimizer states that `saved` has values of, as the optimizer's first step would."""
        for name, _, flat, *_ in self._owned():
            if kinds := saved.kinds[name]:
                state = self.optimizer.state[flat]
                state[STEP] = torch.tensor(float(saved.steps[name]), device=flat.device)
                for kind in kinds - state.keys():
                    state[kind] = torch.zeros_like(flat, requires_grad=False)

    @torch.no_grad()
    def _sync_weights(self, saved: SavedEngine) -> None:
        """Copy the optimizer's weights into those that the network computes with."""
        stage = self.config.zero_stage
        for name, parameter in self.module.named_parameters():
            # at stage 3 small ones are kept whole on all ranks
            if stage < 3 or parameter.data.numel() == parameter.ds_numel:  # type: ignore[attr-defined]
                parameter.data.copy_(saved.tensor(WEIGHT, name))
        if stage < 3:
            if any(saved.kinds.values()):  # DeepSpeed does this after the first step, once
                self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
            return
        for _, parameter, flat, offset, _, count in self._owned():
            parameter.ds_tensor.data[:count].copy_(flat.detach().narrow(0, offset, count))  # type: ignore[attr-defined]

    def close(self) -> None:
        self.deepspeed.destroy()
