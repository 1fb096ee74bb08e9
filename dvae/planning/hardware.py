"""Peak performance of GPUs, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from dvae.errors import UserError, suggest


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One GPU of a node. Giga and tera are powers of ten, as on the data sheets."""

    bf16: float
    """Dense bf16 matrix products with fp32 accumulation, in TFLOP/s."""
    tf32: float
    """Dense TF32, in TFLOP/s. PyTorch uses TF32 for fp32 convolutions by default."""
    fp32: float
    """Full fp32, in TFLOP/s. PyTorch uses it for fp32 matrix products by default."""
    memory: float
    """Memory in GB."""
    bandwidth: float
    """Memory bandwidth in GB/s."""
    link: float
    """Bandwidth to the other GPUs of the node in GB/s per direction. Data sheets print the sum of both directions."""
    network: float
    """This GPU's share of the node's network bandwidth, in GB/s per direction."""
    about: str
    """The exact model, and the system that the network figure is from."""


GPUS = {
    "a100": GPU(
        bf16=312, tf32=156, fp32=19.5, memory=80, bandwidth=2039, link=300, network=25,
        about="A100 SXM 80GB; network of a DGX A100, 200 Gbit/s a GPU",
    ),
    "h100": GPU(
        bf16=989.4, tf32=494.7, fp32=66.9, memory=80, bandwidth=3350, link=450, network=50,
        about="H100 SXM 80GB; network of a DGX H100, 400 Gbit/s a GPU",
    ),
    "h200": GPU(
        bf16=989.4, tf32=494.7, fp32=66.9, memory=141, bandwidth=4800, link=450, network=50,
        about="H200 SXM; network of a DGX H200, 400 Gbit/s a GPU",
    ),
    "b200": GPU(
        bf16=2250, tf32=1125, fp32=75, memory=180, bandwidth=8000, link=900, network=50,
        about="B200 of an HGX board; network of a DGX B200, 400 Gbit/s a GPU",
    ),
    "l40s": GPU(
        bf16=362, tf32=183, fp32=91.6, memory=48, bandwidth=864, link=32, network=12.5,
        about="L40S; PCIe 4.0 x16 between GPUs, a network of 100 Gbit/s a GPU assumed",
    ),
}  # fmt: skip


def gpu_of(name: str) -> GPU:
    """Return the GPU called `name`. Raises UserError that suggests the nearest name if it is not in the table."""
    if name not in GPUS:
        raise UserError(f"unknown gpu {name!r}: {suggest(name, GPUS)}")
    return GPUS[name]
