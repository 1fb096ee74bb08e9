"""What the convolutional and transformer refiners have in common, on small networks."""

from __future__ import annotations

import pytest
import torch

from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition, Refiner

LEVELS = {"width": 32, "multipliers": [1, 2], "blocks": 1}
SMALL = {
    "unet": {**LEVELS, "attention_resolutions": [8]},
    "simple_unet": LEVELS,
    "flat_resnet": {"width": 32, "blocks": 2},
    "ncsnpp": {**LEVELS, "attention_resolutions": [8], "dropout": 0.0},
    "ncsnpp, best": {
        **LEVELS, "attention_resolutions": [8], "dropout": 0.0, "fir": True, "progressive_input": True,
        "time": "fourier",
    },
    "dit": {"width": 32, "depth": 2, "heads": 2},
}  # fmt: skip
every_refiner = pytest.mark.parametrize("name", SMALL)
ALL = Shapes(image_size=8, k=2, outputs=1, condition_channels=3, latent=(2, 2, 2), condition_latent=True, labels=4)


def small(name: str, shapes: Shapes, **fields: object) -> Refiner:
    """A small net whose zero-initialized layers are moved off zero."""
    torch.manual_seed(0)
    refiner = REFINERS.build({"name": name.partition(",")[0], **SMALL[name], **fields}, shapes)
    with torch.no_grad():
        for parameter in refiner.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return refiner


def unattended(name: str) -> dict[str, object]:
    """Fields that keep attention to the coarsest level, so that any image size will do."""
    return {"attention_resolutions": []} if "attention_resolutions" in SMALL[name] else {}


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, NetworkCondition]:
    draw = torch.Generator().manual_seed(1)
    u, image = (torch.randn(batch, c, 8, 8, generator=draw) for c in (6, 3))
    latent, label = torch.randn(batch, 2, 2, 2, generator=draw), torch.tensor([0, 4, 2])[:batch]
    return u, torch.tensor([0.1, 500.0, 20.0])[:batch], NetworkCondition(image, latent, label)


@every_refiner
def test_starts_at_zero(name):
    refiner = REFINERS.build({"name": name.partition(",")[0], **SMALL[name]}, Shapes(image_size=8))
    assert not refiner(torch.randn(2, 3, 8, 8), torch.tensor([0.0, 999.0]), NetworkCondition()).any()


@every_refiner
def test_every_condition_is_heard_by_each_sample(name):
    refiner = small(name, ALL)
    u, t, given = inputs()
    base = refiner(u, t, given)
    assert base.shape == (2, 3, 8, 8)  # one component of two
    others = {
        "state": refiner(u + 1, t, given),
        "time": refiner(u, t + 50, given),
        "small time": refiner(u, t + 1, given),
        "image": refiner(u, t, NetworkCondition(given.image + 1, given.latent, given.label)),
        "latent": refiner(u, t, NetworkCondition(given.image, given.latent + 1, given.label)),
        "label": refiner(u, t, NetworkCondition(given.image, given.latent, torch.tensor([1, 1]))),
    }
    deaf = [key for key, other in others.items() if (other - base).abs().amax(dim=(1, 2, 3)).min() < 1e-5]
    assert deaf == []


@every_refiner
def test_samples_do_not_mix(name):
    refiner = small(name, ALL)
    u, t, given = inputs(3)
    alone = []
    for i in range(3):
        one = slice(i, i + 1)
        alone.append(refiner(u[one], t[one], NetworkCondition(given.image[one], given.latent[one], given.label[one])))
    torch.testing.assert_close(refiner(u, t, given), torch.cat(alone), rtol=1e-4, atol=1e-5)


@every_refiner
def test_memory_format_of_the_inputs_does_not_matter(name):
    refiner = small(name, ALL)
    u, t, given = inputs()
    last = torch.channels_last
    again = refiner(u.contiguous(memory_format=last), t, NetworkCondition(given.image.contiguous(memory_format=last),
                    given.latent, given.label))  # fmt: skip
    torch.testing.assert_close(again, refiner(u, t, given), rtol=1e-4, atol=1e-5)


@every_refiner
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(name, bf16):
    dropout = {} if name == "dit" else {"dropout": 0.5}
    u, t, given = inputs()
    results = []
    for again in (False, True):
        refiner = small(name, ALL, checkpoint_blocks=again, **dropout)
        x = u.clone().requires_grad_()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = refiner(x, t, given)
        output.square().mean().backward()
        results.append({"output": output, "u": x.grad} | {key: p.grad for key, p in refiner.named_parameters()})
    for key, plain in results[0].items():
        assert torch.equal(plain, results[1][key]), key


@every_refiner
def test_checkpointed_blocks_keep_less(name):
    shapes = Shapes(image_size=32)
    kept = []
    for again in (False, True):
        refiner = small(name, shapes, checkpoint_blocks=again, **unattended(name))
        weights = {p.data_ptr() for p in refiner.parameters()}
        found: dict[int, int] = {}

        def pack(tensor, weights=weights, found=found):
            if tensor.data_ptr() not in weights:
                found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            refiner(torch.randn(1, 3, 32, 32), torch.ones(1), NetworkCondition())
        kept.append(sum(found.values()))
    assert kept[1] < 0.5 * kept[0]


@every_refiner
@pytest.mark.parametrize("missing", ["image", "latent", "label"])
def test_a_missing_condition_is_named(name, missing):
    u, t, given = inputs()
    parts = {key: getattr(given, key) for key in ("image", "latent", "label") if key != missing}
    with pytest.raises(ValueError, match=rf"condition\.{missing}, which was not given"):
        small(name, ALL)(u, t, NetworkCondition(**parts))


@every_refiner
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patch_keeps_the_shape(name, patch):
    refiner = small(name, ALL, patch=patch, **unattended(name))
    assert refiner(*inputs()).shape == (2, 3, 8, 8)


@every_refiner
@pytest.mark.parametrize("latent", [(), (0,)])
def test_latent_guidance_needs_a_latent(name, latent):
    with pytest.raises(UserError, match="latent guidance needs a latent shape"):
        small(name, Shapes(image_size=8, latent=latent, condition_latent=True))


WRONG = [
    *[(name, {"patch": 3}, "patch 3") for name in SMALL],
    *[(name, {"patch": 0}, "patch 0") for name in SMALL],
    *[(name, {"width": 48}, "48 is not a multiple of 32") for name in SMALL if name != "dit"],
    *[(name, {"blocks": 0}, "at least one") for name in SMALL if name != "dit"],
    *[(name, {"dropout": 1.0}, r"dropout 1.0 is not in \[0, 1\)") for name in SMALL if name != "dit"],
    *[(name, {"multipliers": []}, "at least one level") for name in SMALL if "multipliers" in SMALL[name]],
    *[(name, {"multipliers": [1] * 5}, "do not halve 4 times") for name in SMALL if "multipliers" in SMALL[name]],
    ("ncsnpp", {"attention_resolutions": [16]}, r"\[16\] do not occur"),
    ("ncsnpp", {"time_scale": 0.0}, "time_scale 0.0"),
    ("ncsnpp", {"fourier_scale": -1.0}, "fourier_scale -1.0"),
    ("dit", {"heads": 3}, "32 is not a multiple of 4 and of refiner.heads 3"),
    ("dit", {"width": 6, "heads": 3}, "6 is not a multiple of 4"),
    ("dit", {"depth": 0}, "depth 0"),
]


@pytest.mark.parametrize(("name", "fields", "says"), WRONG)
def test_refuses_in_one_line(name, fields, says):
    with pytest.raises(UserError, match=says) as caught:
        small(name, Shapes(image_size=8), **fields)
    assert "\n" not in str(caught.value)
