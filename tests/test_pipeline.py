"""The pipeline of a run that was never trained: every sampler on every process, inpainting, classes."""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import integrable

from dvae import config, models
from dvae.data.images import to_float
from dvae.errors import UserError
from dvae.guidance import Guidance
from dvae.pipeline import Pipeline
from dvae.registry import SAMPLERS

PHASE_SPACE = ["schedule=constant", "denoiser.prediction=eps", "sampler=em"]
WORDS = {"vp": [], "psld": ["process=psld", *PHASE_SPACE], "cld": ["process=cld", *PHASE_SPACE]}


def pipeline(tiny: list[str], *words: str) -> Pipeline:
    settings = config.typed(config.compose("train", [*tiny, "denoiser.data_scale=1", *words]))
    made = models.build(settings)
    for module in made.trained().values():
        module.eval().requires_grad_(False)
    with torch.no_grad():
        made.denoiser.refiner.out[2].weight.normal_(std=0.02)  # it starts at zero
    return Pipeline(settings, made, batch=3)


CASES = integrable(("vp",), ("cosine",)) + integrable(("psld", "cld"), ("constant",))


@pytest.mark.parametrize(("name", "process", "schedule"), CASES)
def test_every_sampler_draws_images_with_every_process_it_supports(
    name: str, process: str, schedule: str, tiny: list[str]
) -> None:
    made = pipeline(tiny, *WORDS[process])
    made.use_sampler({"name": name, "steps": 4} | ({"tolerance": 0.1} if name == "ode" else {}))
    vae, refined = made.generate(4, seed=0)
    assert vae.shape == refined.shape == (4, 3, 16, 16)
    assert refined.float().std() > 1.0
    assert made.nfe >= 4
    alone = made.refine(made.draw(4, 0)[3:], 0, numbers=[3])  # the batch is of no account, up to rounding
    together = made.refine(made.draw(4, 0), 0)[3:]
    assert (alone - together).abs().mean() < 0.02


@pytest.mark.parametrize("process", ["vp", "psld"])
def test_inpainting_keeps_known_pixels_exactly(process: str, tiny: list[str]) -> None:
    made = pipeline(tiny, *WORDS[process])
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    mask = torch.ones(4, 1, 16, 16, dtype=torch.bool)
    mask[:, :, 4:12, 4:12] = False
    out = made.inpaint(images, mask, seed=1)
    assert torch.equal(out[mask.expand_as(out)], images[mask.expand_as(out)])
    hole = ~mask.expand_as(out)
    assert not torch.equal(out[hole], images[hole])
    assert not torch.equal(out[hole], made.inpaint(images, mask, seed=2)[hole])


def test_inpainting_needs_common_steps(tiny: list[str]) -> None:
    made = pipeline(tiny)
    made.use_sampler({"name": "ode"})
    assert not SAMPLERS.get("ode").by_steps
    with pytest.raises(UserError, match="sampler=ddim"):
        made.inpaint(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.ones(1, 1, 16, 16, dtype=torch.bool), 0)


def test_guidance_costs_passes(tiny: list[str]) -> None:
    made = pipeline(tiny, "denoiser.condition_dropout=0.1")
    assert (made.generate(2, 0), made.nfe)[1] == 2
    assert (made.generate(2, 0, guidance=Guidance(condition=3.0)), made.nfe)[1] == 4


def test_classes_are_drawn_evenly_or_as_asked_for(tiny: list[str]) -> None:
    made = pipeline(tiny, "classes=[a,b,c]", "data.label=kind", "denoiser.condition_label=true")
    assert made.draw(5, 0, label=made.class_number("b")).label.tolist() == [1] * 5
    counts = torch.bincount(made.draw(300, 0).label, minlength=3)
    assert counts.min() > 70
    with pytest.raises(UserError, match=r"label=d: .*known: a, b, c"):
        made.class_number("d")
    with pytest.raises(UserError, match="no classes"):
        pipeline(tiny).class_number("a")


def test_a_sampler_names_those_that_can(tiny: list[str]) -> None:
    made = pipeline(tiny, *WORDS["psld"])
    with pytest.raises(UserError, match="sampler=ddim does not integrate process=psld on schedule=constant") as refusal:
        made.use_sampler({"name": "ddim"})
    able = str(refusal.value).partition("use one of ")[2].split(", ")
    assert set(able) == {name for name, process, _ in CASES if process == "psld"}
    with pytest.raises(UserError, match=r"sampler\.spacing=karras needs one signal-to-noise ratio"):
        made.use_sampler({"name": "em", "spacing": "karras"})


@pytest.mark.parametrize("process", ["vp", "psld"])
def test_bits_per_dim_of_the_refiner(process: str, tiny: list[str]) -> None:
    """A network that puts out zero, as v or as mixed eps, says that the state is N(0, 1): bits in closed form."""
    words = ["denoiser.centre=none", *WORDS[process]]
    made = pipeline(tiny, *words, *(["denoiser.mixed=true"] if process == "psld" else []))
    with torch.no_grad():
        made.models.denoiser.refiner.out[2].weight.zero_()
    images = torch.cat([torch.randint(120, 136, (2, 3, 16, 16)), torch.randint(0, 256, (2, 3, 16, 16))]).byte()
    bits = made.bits_per_dim(images, seed=0, tolerance=1e-3)
    x = to_float(images).double().flatten(1)
    nats = 0.5 * x.square().mean(1) + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(bits, nats / math.log(2) + math.log2(127.5), rtol=0, atol=0.02)
