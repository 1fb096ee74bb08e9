"""The training engine: DeepSpeed around one trainable module. This is the only file that imports deepspeed."""

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
    """Import DeepSpeed at its first use, and return the module.

    The import takes about a second. Composing a run's settings imports every stage, and must not pay for it.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it DeepSpeed warns that it found no accelerator
    return importlib.import_module("deepspeed")


def start_distributed() -> None:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, ...), or create a group of one."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    ranks.join()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asserts that the variable is set, also for a single process
    # On CPUs, DeepSpeed compiles this operator for a minute or more. Only its inference_all_reduce uses the operator,
    # and training never calls that. Marking the operator as incompatible prevents the compilation.
    _deepspeed().ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The group exists already, so this only wraps it for deepspeed.comm. MPI discovery would look for mpi4py.
    _deepspeed().init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of step number `step` (from 1): linear warm-up, then constant or cosine decay to 0.

    It depends on the step number alone, so a resumed run needs no scheduler state.
    """
    warm = min(1.0, step / config.warmup) if config.warmup else 1.0
    if config.lr_decay is Decay.constant:
        return config.lr * warm
    progress = min(1.0, max(0.0, (step - config.warmup) / max(1, config.steps - config.warmup)))
    return config.lr * warm * 0.5 * (1.0 + math.cos(math.pi * progress))


class Engine:
    """One module with its optimizer, averaged weights, precision and ZeRO partition."""

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
            "zero_allow_untested_optimizer": True,  # DeepSpeed knows no AdamWEma, and would reject it
            # With offload, DeepSpeed by default accepts only its own CPU optimizers, which keep no averaged weights.
            "zero_force_ds_cpu_optimizer": False,
            # Autocast leaves the weights in fp32. DeepSpeed's bf16 mode would cast them, and then computations that
            # are fp32 on purpose (times, scalings, the loss) fail when they meet bf16 weights.
            "torch_autocast": {
                "enabled": config.precision is Precision.bf16,
                "dtype": "bfloat16",
                # DeepSpeed would reduce the gradients of the modules in this list in bf16 at stages 1 to 3. Then
                # results would depend on the stage and on the number of ranks.
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": 10**9,  # in effect never: the training loop reports progress
        }

    def _zero(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "stage": self.config.zero_stage,
            "reduce_bucket_size": bucket_size(
                self.parameters
            ),  # at stage 3 the default takes 2 GB even for a small model
            # The default makes stage 3 replace torch.nn.functional.linear in the whole process. The replacement
            # rounds differently, so results would depend on the stage.
            "memory_efficient_linear": False,
        }
        return settings | ({"offload_optimizer": {"device": "cpu"}} if self.config.offload else {})

    def __call__(self, *args: Any) -> Any:
        return self.deepspeed(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of one micro-batch. DeepSpeed divides the loss by the number of micro-batches."""
        self.deepspeed.backward(loss)

    def gradients_finite(self) -> bool:
        """Return whether the accumulated gradients of all ranks are finite, and set `grad_norm`.

        Call it on every rank, after the last micro-batch and before `step`.
        """
        # One norm answers the question for all gradients, because NaN and infinity propagate through it.
        if self.config.zero_stage == 0:  # DeepSpeed has reduced the gradients, so every rank holds the same ones
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        elif self.config.zero_stage < 3:
            # With offload, gradients are copied to the host asynchronously. The norm must not be read before.
            self.deepspeed.optimizer._wait_for_offload_copies()
            norm = self.deepspeed.optimizer.scaled_global_norm()
        else:
            # Stage 3 has no scaled_global_norm. These two calls are how its own step computes the norm. They replace
            # the norm -1, by which DeepSpeed marks a group with NaN or infinity, by infinity.
            norm = _deepspeed().runtime.utils.combine_grad_norm_groups(self.deepspeed.optimizer._get_norm_groups())
        self.grad_norm = float(norm)
        return math.isfinite(self.grad_norm)

    def step(self, number: int, finite: bool | None = None) -> bool:
        """Take step `number` (from 1), and return False if the step was skipped.

        Call it after each micro-batch. Before the last micro-batch it only ends the micro-batch, and returns True. A
        skipped step changes neither weights nor moments nor averaged weights.

        Args:
            number: Step number. It determines the learning rate and the decays of the averages.
            finite: Whether the gradients of all engines are finite. If it is False, the step is skipped. If it is
                None, the gradients of this engine alone decide.
        """
        rate, decays = learning_rate(self.config, number), ema_decays(self.config.ema, number)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"], group["ema_decays"] = rate, decays
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # DeepSpeed counts micro-batches here; it does not call the optimizer
            return True
        finite = self.gradients_finite() if finite is None else finite
        # At stages 1 to 3 DeepSpeed skips a step if the gradients of this engine are not finite. It does not check
        # them at stage 0, and it never knows about other engines. Hence AdamWEma itself skips the step.
        self.optimizer.overflow = not finite
        self.deepspeed.step()
        return finite

    def gradient_norms(self) -> dict[str, float]:
        """L2 norm of the accumulated gradient of each parameter, over all ranks. Every rank takes part.

        The gradients exist only between the last `backward` and `step`.
        """
        norms = {}
        for name, parameter in self.module.named_parameters():
            if self.config.zero_stage == 0:
                gradient = parameter.grad
            elif self.config.zero_stage < 3:
                # safe_get_full_grad would return parameter.grad if that is set, which is not reduced over the ranks.
                gradient = parameter.get_full_hp_grad()  # type: ignore[attr-defined]
            else:
                gradient = _deepspeed().utils.safe_get_full_grad(parameter)
            if gradient is not None:
                norms[name] = float(torch.linalg.vector_norm(gradient.float()))
        return norms

    def weights(self) -> dict[str, torch.Tensor]:
        """State dict of the module's weights, complete on every rank. Every rank takes part."""
        state = {name: value.detach().clone() for name, value in persistent_buffers(self.module).items()}
        for name, parameter in self.module.named_parameters():
            # At stage 3 a parameter is an empty placeholder, and ds_shape is its real shape. All ranks gather it here.
            full = _deepspeed().utils.safe_get_full_fp32_param(parameter) if self.config.zero_stage == 3 else parameter
            state[name] = full.detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
        return state

    def averaged_weights(self, ema: str = MAIN) -> dict[str, torch.Tensor]:
        """State dict of the module with averaged weights, complete on every rank. Every rank takes part.

        `ema` is the name of an average, see `ema_names`. Before the first step the average equals the weights.
        """
        state = {name: value.detach().clone() for name, value in self.module.named_buffers()}
        started = any(ema in state for state in self.optimizer.state.values())
        for name, parameter in self.module.named_parameters():
            if self.config.zero_stage == 0:
                average = self.optimizer.state.get(parameter, {}).get(ema, parameter)
            else:
                # Before the first step the optimizer has no states, and DeepSpeed would raise an error for them. Then
                # take the weights. They are gathered too, because at stage 3 a parameter is an empty placeholder.
                average = _deepspeed().utils.safe_get_full_optimizer_state(parameter, ema) if started else None
                average = _deepspeed().utils.safe_get_full_fp32_param(parameter) if average is None else average
            state[name] = average.detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
        return state

    def snapshot(self) -> EnginePartition:
        """Copy this rank's partition of the engine's state to the host.

        It is a copy, so training may continue while another thread writes it.
        """
        stage = self.config.zero_stage
        fragments = [
            fragment
            for number, fragment in enumerate(self._fragments())
            # At stage 0 every rank holds all values, so each parameter is saved by one rank.
            if stage or number % ranks.world_size() == ranks.rank()
        ]
        return copy_partition(fragments, persistent_buffers(self.module) if ranks.rank() == 0 else {})

    def load(self, folder: Path) -> None:
        """Load the state in `folder`. Any number of ranks, at any ZeRO stage, may have written it.

        Every rank takes part. Raises MachineError if a file is damaged, or belongs to another model.
        """
        saved = SavedEngine(folder)
        parameters = {name for name, _ in self.module.named_parameters()}
        for name in sorted(parameters ^ saved.shapes.keys()):
            raise MachineError(
                f"{folder}: {name!r} is not in both the checkpoint and the model: use the version that wrote it"
            )
        own_buffers, saved_buffers = persistent_buffers(self.module), saved.buffers()
        for name in sorted(own_buffers.keys() - saved_buffers.keys()):
            raise MachineError(f"{folder}: {name!r} is not in the checkpoint: use the version that wrote it")
        shapes = saved.shapes | {name: tuple(value.shape) for name, value in saved_buffers.items()}
        for name, value in [*self.module.named_parameters(), *own_buffers.items()]:
            shape = tuple(getattr(value, "ds_shape", value.shape))
            if shapes[name] != shape:
                raise MachineError(f"{folder}: {name!r} is {shapes[name]} in the checkpoint, {shape} in the model")
        # A new optimizer allocates moments and averages in its first step. They must exist before they are filled.
        self._allocate_states(saved)
        for fragment in self._fragments():
            for kind, values in fragment.values.items():
                values.copy_(saved.read(kind, fragment.name, fragment.start, values.numel()))
        if self.config.zero_stage:
            self._sync_weights(saved)
        for name, buffer in own_buffers.items():
            buffer.copy_(saved_buffers[name])

    def _owned(self) -> Iterator[OwnedSlice]:
        """Slices of the parameters that this rank's optimizer updates."""
        return owned_slices(self.module, self.deepspeed.optimizer, self.config.zero_stage, ranks.rank())

    def _fragments(self) -> Iterator[Fragment]:
        """Views of the weights, moments and averages that this rank's optimizer updates, parameter by parameter."""
        for name, parameter, flat, offset, start, count in self._owned():
            state = self.optimizer.state.get(flat, {})
            states = {kind: value for kind, value in state.items() if kind != STEP} | {WEIGHT: flat}
            values = {kind: value.detach().view(-1).narrow(0, offset, count) for kind, value in states.items()}
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            yield Fragment(name, shape, start, values, int(state.get(STEP, 0)))

    def _allocate_states(self, saved: SavedEngine) -> None:
        """Allocate the optimizer states for which `saved` has values, as the optimizer's first step would."""
        for name, _, flat, *_ in self._owned():
            if kinds := saved.kinds[name]:
                state = self.optimizer.state[flat]
                # A tensor on the device, because the fused AdamW requires it.
                state[STEP] = torch.tensor(float(saved.steps[name]), device=flat.device)
                for kind in kinds - state.keys():
                    state[kind] = torch.zeros_like(flat, requires_grad=False)

    @torch.no_grad()
    def _sync_weights(self, saved: SavedEngine) -> None:
        """Update the weights of the network after the optimizer's own copy of them was loaded (stages 1 to 3)."""
        stage = self.config.zero_stage
        for name, parameter in self.module.named_parameters():
            # At stage 3 DeepSpeed keeps parameters of fewer than 100,000 values complete on every rank.
            if stage < 3 or parameter.data.numel() == parameter.ds_numel:  # type: ignore[attr-defined]
                parameter.data.copy_(saved.tensor(WEIGHT, name))
        if stage < 3:
            # This links the optimizer states to the parameters, so that averaged_weights finds them. DeepSpeed does it
            # after its first step, but the weights may be exported or scored before a resumed run takes a step.
            if any(saved.kinds.values()):
                self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
            return
        # ds_tensor is this rank's partition, from which DeepSpeed gathers a parameter for each forward pass. Its end
        # may be padding.
        for _, parameter, flat, offset, _, count in self._owned():
            parameter.ds_tensor.data[:count].copy_(flat.detach().narrow(0, offset, count))  # type: ignore[attr-defined]

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the module and release its buffers."""
        self.deepspeed.destroy()
