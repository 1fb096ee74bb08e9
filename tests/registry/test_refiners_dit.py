from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dvae.registry.core import Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition
from dvae.registry.refiners.dit import DiT

NODE = {"name": "dit", "patch": 2, "width": 16, "depth": 2, "heads": 2}


def random_weights(shapes: Shapes, **fields: object) -> DiT:
    torch.manual_seed(0)
    refiner = REFINERS.build({**NODE, **fields}, shapes)
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return refiner


def normed(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()


def plain(refiner: DiT, u: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """One image (C, 4, 6) through the network written out, patch by patch and head by head."""
    p = {key: value.double() for key, value in refiner.state_dict().items()}
    patches = [u[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten() for i in range(2) for j in range(2)]
    x = torch.stack(patches) @ p["in_proj.weight"].T + p["in_proj.bias"] + p["positions"]
    for n in range(2):

        def layer(name: str, a: torch.Tensor, n: int = n) -> torch.Tensor:
            return a @ p[f"blocks.{n}.{name}.weight"].T + p[f"blocks.{n}.{name}.bias"]

        shift1, scale1, gate1, shift2, scale2, gate2 = layer("modulate.1", F.silu(embedding)).split(16)
        q, k, v = layer("qkv", normed(x) * (1 + scale1) + shift1).split(16, dim=1)
        heads = [
            torch.softmax(q[:, h] @ k[:, h].T / math.sqrt(8), dim=1) @ v[:, h] for h in (slice(0, 8), slice(8, 16))
        ]
        x = x + gate1 * layer("project", torch.cat(heads, dim=1))
        hidden = F.gelu(layer("mlp.0", normed(x) * (1 + scale2) + shift2), approximate="tanh")
        x = x + gate2 * layer("mlp.2", hidden)
    shift, scale = (F.silu(embedding) @ p["modulate.1.weight"].T + p["modulate.1.bias"]).split(16)
    output = (normed(x) * (1 + scale) + shift) @ p["out_proj.weight"].T + p["out_proj.bias"]
    image = torch.zeros(3, 4, 4, dtype=torch.float64)
    for index, patch in enumerate(output):
        i, j = divmod(index, 2)
        image[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = patch.view(3, 2, 2)
    return image


@pytest.mark.parametrize("backend", ["math", "sdpa", "auto"])
def test_agrees_with_the_network_written_out(backend):
    refiner = random_weights(Shapes(image_size=4, condition_channels=1), attention=backend)
    u, image, t = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([5.0, 700.0])
    seen: list[torch.Tensor] = []
    refiner.time_embed.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        got = refiner(u, t, NetworkCondition(image=image))
    for sample in range(2):
        wanted = plain(refiner, torch.cat([u, image], dim=1)[sample].double(), seen[0][sample].double())
        torch.testing.assert_close(got[sample], wanted.float(), rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_blocks_start_as_the_identity_and_the_output_as_zero():
    torch.manual_seed(0)
    refiner = REFINERS.build(NODE, Shapes(image_size=8, labels=3))
    tokens, embedding = torch.randn(2, 16, 16), torch.randn(2, 16)
    for block in refiner.blocks:
        assert torch.equal(block(tokens, embedding), tokens)
    u = torch.randn(2, 3, 8, 8)
    assert not refiner(u, torch.tensor([0.0, 999.0]), NetworkCondition(label=torch.tensor([0, 3]))).any()


def test_positions_are_fixed_and_saved():
    refiner = REFINERS.build(NODE, Shapes(image_size=8))
    assert "positions" in refiner.state_dict()
    assert "positions" not in dict(refiner.named_parameters())


def test_patches_at_other_places_are_told_apart():
    refiner = random_weights(Shapes(image_size=8))
    u = torch.zeros(1, 3, 8, 8)
    patches = F.pixel_unshuffle(refiner(u, torch.ones(1), NetworkCondition()), 2).flatten(2)[0].T
    assert (torch.cdist(patches, patches) + 9 * torch.eye(16)).min() > 1e-3


def test_vector_and_map_latents_are_heard_alike():
    vector = random_weights(Shapes(image_size=8, latent=(8,), condition_latent=True))
    folded = random_weights(Shapes(image_size=8, latent=(2, 2, 2), condition_latent=True))
    u, t, z = torch.randn(2, 3, 8, 8), torch.ones(2), torch.randn(2, 8)
    assert torch.equal(
        vector(u, t, NetworkCondition(latent=z)), folded(u, t, NetworkCondition(latent=z.view(2, 2, 2, 2)))
    )
