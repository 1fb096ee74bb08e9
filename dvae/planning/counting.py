"""Counts on fake tensors, which have shapes and no values: floating-point operations, and what autograd keeps.

Operations and passing memory are those of a forward and a backward pass on a fake CPU. What is kept for the gradient is
counted on a fake GPU, since CUDA's autocast keeps other things than the CPU's (its group norm is fp32); autograd has no
backward pass for a GPU that is not there.
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
    """Operations of q k' and of the weighted sum of v; shapes are (B, heads, L, D) and (B, heads, S, D)."""
    return 4 * q.numel() * k[2]


def attention_backward(gradient: torch.Size, q: torch.Size, k: torch.Size, *rest: Any, **words: Any) -> int:
    """q k' once more, and the two gradients of each of the two products."""
    return 10 * q.numel() * k[2]


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(attention_forward),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(attention_backward),
}
"""Operations by kind: those of torch's FlopCounterMode, and attention's kernel on a CPU, which that does not know."""
CONVOLUTIONS = (aten.convolution, aten._convolution, aten.convolution_backward)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations, a multiplication and an addition as two; all other kinds of work count as none."""

    convolutions: int = 0
    products: int = 0
    """Of matrix products, attention included."""

    @property
    def total(self) -> int:
        return self.convolutions + self.products

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.convolutions + other.convolutions, self.products + other.products)

    def each(self, images: int) -> Operations:
        """Per image, of those of `images`."""
        return Operations(self.convolutions // images, self.products // images)


class SavedTensors:
    """Bytes that autograd keeps for the gradient while this is entered: each storage once, those of weights not."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        # storages are held, so that the address of one that was freed is not taken for another's
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
    return int(tensor.untyped_storage()._cdata)


class OperationCounter(TorchDispatchMode):
    """Floating-point operations, and bytes of the storages that were made, while this is entered.

    FlopCounterMode counts the same operations, but keeps alive what checkpointed blocks compute again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = Operations()
        self.now = self.peak = 0
        """Bytes that are alive, and that were at most."""
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {address(item) for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)}
        for item in tree_leaves(made):
            if isinstance(item, torch.Tensor) and address(item) not in given:  # not a view, nor in place
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
    """Attention by the kernels of a real GPU; for a fake one torch writes the formula out, which keeps (L, L) maps."""

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
    """Autocast as the engine has it; torch.autocast itself refuses a GPU that is not there."""
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
    """Weights and buffers of modules that are on meta, anew on a device, which may be one that is not there.

    To be called where tensors are fake.
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
    """A forward pass as a stage has it, in two parts."""

    trained: nn.Module
    frozen: tuple[nn.Module, ...]
    draw: Callable[[int], tuple[Any, ...]]
    """Images, noise and times of a micro-batch of so many, on the CPU, outside of any fake tensors."""
    prepare: Callable[..., tuple[Any, ...]]
    """prepare(device, *drawn): what the frozen modules make of that, without a gradient."""
    loss: Callable[..., torch.Tensor]
    """loss(*prepared), a scalar."""


@contextmanager
def fake_pass(of: ForwardPass, device: str) -> Iterator[None]:
    """Make the modules fake, and every tensor that is made within."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        planned_attention(),
        FusedAttention() if device == "cuda" else nullcontext(),
    ):
        make_fake((of.trained, *of.frozen), device)
        yield


def saved_bytes(of: ForwardPass, images: int, device: str, bf16: bool, faked: bool = True) -> int:
    """Bytes that a forward pass keeps for the gradient, weights left out; of modules as they are, if not `faked`."""
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
    """What the two passes over a micro-batch take, as a CPU has them."""

    frozen: Operations
    """Of what is not trained."""
    trained: Operations
    """Forward and backward of what is, activations that are computed again included."""
    kept: int
    """Bytes kept for the gradient."""
    peak: int
    """Bytes that operations have made and not yet freed, at most; gradients of weights count while they are new."""


def count_pass(of: ForwardPass, images: int, bf16: bool) -> PassCost:
    """Operations and memory of a forward and a backward pass."""
    drawn = of.draw(images)
    with fake_pass(of, "cpu"), autocast_as_trained("cpu", bf16):
        with OperationCounter() as before, torch.no_grad():
            prepared = of.prepare("cpu", *drawn)
        for weight in of.trained.parameters():
            weight.grad = torch.empty_like(weight)  # as in the second of several micro-batches: planned for elsewhere
        with OperationCounter() as within:
            with SavedTensors(of.trained.parameters()) as found:
                loss = of.loss(*prepared)
            size = found.bytes
            del found  # which holds what the backward pass frees
            loss.backward()
    return PassCost(before.operations, within.operations, size, within.peak)
