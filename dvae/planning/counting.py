"""Count floating-point operations and activation memory on fake tensors, which have shapes but no values.

Two kinds of fake device are used:

- Operations and transient memory are counted over a forward and a backward pass on a fake CPU. Autograd cannot run a
  backward pass on a GPU that does not exist.
- Tensors that autograd saves for the backward pass are counted on a fake GPU. Autocast on CUDA saves other tensors than
  on the CPU; for example, it runs group norm in fp32.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from dvae.layers.attention import planned_attention

aten = torch.ops.aten


def attention_forward(q: torch.Size, k: torch.Size, *rest: Any, **words: Any) -> int:
    """Count the operations of q k' and of the weighted sum of v, for q (B, heads, L, D) and k (B, heads, S, D)."""
    return 4 * q.numel() * k[2]


def attention_backward(gradient: torch.Size, q: torch.Size, k: torch.Size, *rest: Any, **words: Any) -> int:
    """Count the operations of the backward pass: q k' once more, and two gradients of each of the two products."""
    return 10 * q.numel() * k[2]


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(attention_forward),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(attention_backward),
}
"""Functions that count the operations of each operator.

They are the formulas of torch's FlopCounterMode, and two for the CPU's attention kernel, which FlopCounterMode lacks.
"""
CONVOLUTIONS = (aten.convolution, aten._convolution, aten.convolution_backward)


@dataclass(frozen=True)
class Operations:
    """Number of floating-point operations. A multiplication and an addition count as two.

    Operators other than convolutions, matrix products and attention are not counted.
    """

    convolutions: int = 0
    """Operations of convolutions."""
    products: int = 0
    """Operations of matrix products, including attention."""

    @property
    def total(self) -> int:
        return self.convolutions + self.products

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.convolutions + other.convolutions, self.products + other.products)

    def each(self, images: int) -> Operations:
        """Return the operations per image, if these are the operations for `images` images."""
        return Operations(self.convolutions // images, self.products // images)


class SavedTensors:
    """Context manager that counts the bytes that autograd saves for the backward pass.

    Each storage counts once. The storages of `weights` do not count.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        # Keep references to the storages: if one were freed, a new storage could get the same address.
        self._weights = {address(weight): weight for weight in weights}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if address(tensor) not in self._weights:
            self._storages[address(tensor)] = tensor.untyped_storage()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def address(tensor: torch.Tensor) -> int:
    """Return the address that identifies a tensor's storage. Unlike `data_ptr`, fake tensors have it too."""
    return int(tensor.untyped_storage()._cdata)


class OperationCounter(TorchDispatchMode):
    """Context manager that counts floating-point operations and the bytes of new storages.

    FlopCounterMode counts the same operations, but it keeps alive the tensors that checkpointed blocks recompute. The
    memory count would then be too high.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = Operations()
        self.now = self.peak = 0
        """Bytes of the live storages now, and their maximum so far."""
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {address(item) for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)}
        for item in tree_leaves(made):
            if isinstance(item, torch.Tensor) and address(item) not in given:  # skip views and in-place results
                self._see(item.untyped_storage())
        kind = func._overloadpacket
        if kind in FORMULAS:
            count = int(FORMULAS[kind](*args, **(kwargs or {}), out_val=made))
            self.operations += Operations(count, 0) if kind in CONVOLUTIONS else Operations(0, count)
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """Context manager that makes attention on a fake GPU use the fused kernels of a real GPU.

    For a fake GPU, torch otherwise computes attention from its formula, which saves (L, L) maps.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or args[0].device.type != "cuda" or kwargs:
            return func(*args, **(kwargs or {}))
        if torch.is_autocast_enabled("cuda"):
            args = tuple(item.to(torch.get_autocast_dtype("cuda")) for item in args)
        if args[0].dtype is torch.float32:
            return aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        return aten._scaled_dot_product_flash_attention(*args)[0]


@contextmanager
def autocast_as_trained(device: str, bf16: bool) -> Iterator[None]:
    """Enable autocast as the training engine does.

    This sets the state directly because torch.autocast raises an error if the GPU does not exist.
    """
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, bf16)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def make_fake(modules: Iterable[nn.Module], device: str) -> None:
    """Replace the weights and buffers of meta modules by empty ones on `device`, which need not exist.

    Call this while FakeTensorMode is active.
    """
    for module in (inner for outer in modules for inner in outer.modules()):
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


@dataclass(frozen=True)
class ForwardPass:
    """The forward pass of a training stage, in two parts: one without and one with a gradient."""

    trained: nn.Module
    """The module to train."""
    frozen: tuple[nn.Module, ...]
    """Modules that take part but are not trained."""
    draw: Callable[[int], tuple[Any, ...]]
    """draw(images) returns the images, noise and times of a micro-batch, as real tensors on the CPU."""
    prepare: Callable[..., tuple[Any, ...]]
    """prepare(device, *drawn) runs the frozen modules without a gradient and returns the inputs of `loss`."""
    loss: Callable[..., torch.Tensor]
    """loss(*prepared) returns the scalar loss."""


@contextmanager
def fake_pass(of: ForwardPass, device: str) -> Iterator[None]:
    """Make the modules' weights, and every tensor created in this context, fake tensors on `device`."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        planned_attention(),
        FusedAttention() if device == "cuda" else nullcontext(),
    ):
        make_fake((of.trained, *of.frozen), device)
        yield


def saved_bytes(of: ForwardPass, images: int, device: str, bf16: bool, faked: bool = True) -> int:
    """Count the bytes that autograd saves in a forward pass, without weights.

    Args:
        of: The forward pass.
        images: Images of the micro-batch.
        device: Device of the tensors, which need not exist if `faked`.
        bf16: Whether to enable bf16 autocast.
        faked: Whether to use fake tensors. If False, the modules are used as they are.
    """
    drawn = of.draw(images)
    place: AbstractContextManager[None] = fake_pass(of, device) if faked else nullcontext()
    with place, autocast_as_trained(device, bf16):
        with torch.no_grad():
            prepared = of.prepare(device, *drawn)
        with SavedTensors(of.trained.parameters()) as found:
            graph = of.loss(*prepared)
        size = found.bytes
        del graph
    return size


@dataclass(frozen=True)
class PassCost:
    """Operations and memory of a forward and a backward pass over a micro-batch, as counted on a CPU."""

    frozen: Operations
    """Operations of the frozen modules."""
    trained: Operations
    """Operations of the trained module, forward and backward, including recomputed activations."""
    kept: int
    """Bytes saved for the backward pass."""
    peak: int
    """Maximum bytes of live tensors created in the passes. A new weight gradient counts until it is accumulated."""


def count_pass(of: ForwardPass, images: int, bf16: bool) -> PassCost:
    """Count the operations and memory of a forward and a backward pass over `images` images, with or without bf16."""
    drawn = of.draw(images)
    with fake_pass(of, "cpu"), autocast_as_trained("cpu", bf16):
        with OperationCounter() as before, torch.no_grad():
            prepared = of.prepare("cpu", *drawn)
        for weight in of.trained.parameters():
            # The gradients exist already, as in the second of several micro-batches. `Footprint` counts their memory.
            weight.grad = torch.empty_like(weight)
        with OperationCounter() as within:
            with SavedTensors(of.trained.parameters()) as found:
                loss = of.loss(*prepared)
            size = found.bytes
            del found  # it references the saved tensors, which the backward pass could not free otherwise
            loss.backward()
    return PassCost(before.operations, within.operations, size, within.peak)
