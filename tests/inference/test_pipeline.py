"""The pipeline of a run that was never trained: every sampler on every process, inpainting, classes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from closed_forms import integrable

from dvae.config import compose
from dvae.config.model_config import model_config
from dvae.data.images import to_float
from dvae.diffusion.guidance import Guidance
from dvae.errors import UserError
from dvae.inference.batching import chunk_ranges
from dvae.inference.noise import KeyedNoise
from dvae.inference.pipeline import Pipeline
from dvae.inference.refine import refine_images
from dvae.models import components
from dvae.registry.samplers.base import SAMPLERS

PHASE_SPACE = ["schedule=constant", "denoiser.prediction=eps", "sampler=em"]
WORDS = {"vp": [], "psld": ["process=psld", *PHASE_SPACE], "cld": ["process=cld", *PHASE_SPACE]}


def pipeline(tiny: list[str], *words: str, batch: int | None = 3) -> Pipeline:
    settings = compose.to_run_config(compose.compose("train", [*tiny, "denoiser.data_scale=1", *words]))
    torch.manual_seed(0)
    made = components.build_models(settings)
    for module in made.trained_parts().values():
        module.eval().requires_grad_(False)
    with torch.no_grad():
        made.denoiser.refiner.out[2].weight.normal_(std=0.02)  # it starts at zero
    return Pipeline(model_config(settings), made, batch)


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
    alone, _ = refine_images(
        made, made.sample_conditioning(4, 0)[3:], KeyedNoise(0, [3])
    )  # the batch is of no account, up to rounding
    together = refine_images(made, made.sample_conditioning(4, 0), KeyedNoise(0, range(4)))[0][3:]
    assert (alone - together).abs().mean() < 0.02


MAPS = [
    "encoder=kl_gan", "encoder.channels=[16,16]", "encoder.groups=4", "encoder.latent_channels=4",
    "encoder.discriminator_weight=0", "encoder.middle_attention=false",
]  # fmt: skip
LATENT = [
    "recipe=ldm_avatars", *MAPS, "image_size=16", "refiner.width=32", "refiner.multipliers=[1]", "sampler.steps=2"
]  # fmt: skip


@pytest.mark.parametrize(
    ("space", "precision", "rounding"),
    [("vp", "fp32", 1), ("vp", "bf16", 8), ("psld", "fp32", 1), ("latent", "fp32", 1), ("guided", "fp32", 1)],
)
def test_an_image_has_the_same_bits_in_every_request(
    space: str, precision: str, rounding: int, tiny: list[str]
) -> None:
    words = [*WORDS.get(space, []), f"train_refiner.precision={precision}", "denoiser.condition_dropout=0.1"]
    made = pipeline(LATENT, *words[:1], batch=None) if space == "latent" else pipeline(tiny, *words, batch=None)
    guidance = Guidance(condition=2.0 if space == "guided" else 1.0)
    vae, whole = made.generate(40, seed=5, guidance=guidance)
    threads = torch.get_num_threads()
    for first, n in ((0, 1), (3, 7), (14, 5), (33, 7)):
        torch.set_num_threads(3)
        vae_part, part = made.generate(n, seed=5, first=first, guidance=guidance)
        torch.set_num_threads(threads)
        assert torch.equal(part, whole[first : first + n])
        assert (vae is None) == (vae_part is None) == (space == "latent")
        if vae is not None:
            assert torch.equal(vae_part, vae[first : first + n])
    assert not torch.equal(whole[0], whole[1])
    for made.batch in (1, 7, 64):
        _, other = made.generate(40, seed=5, guidance=guidance)
        assert ((other.int() - whole.int()).abs() > rounding).float().mean() < 0.01  # an untrained network may amplify


def test_numbers_that_are_computed_together() -> None:
    assert chunk_ranges(0, 17, None) == [range(16), range(16, 32)]
    assert chunk_ranges(20, 3, None) == [range(16, 32)]
    assert chunk_ranges(20, 3, 2) == [range(20, 22), range(22, 23)]


def test_adaptive_steps_have_the_same_bits_and_images_that_nobody_asked_for_are_not_counted(tiny: list[str]) -> None:
    made = pipeline(tiny, batch=None)
    made.use_sampler("ode", tolerance=0.1)
    counted: list[int] = []
    _, both = made.generate(2, 0, first=15, advance=counted.append)  # the last of a chunk and the first of the next
    together, apart = made.nfe, 0.0
    for i in (0, 1):
        _, alone = made.generate(1, 0, first=15 + i)
        assert torch.equal(alone[0], both[i])
        apart += made.nfe
    assert apart == 2 * together
    assert counted == [1, 1]
    with pytest.raises(UserError, match="n=0 first=0: use n=1"):
        made.generate(0, 0)


def test_fields_of_the_present_sampler_are_changed(tiny: list[str]) -> None:
    made = pipeline(tiny)
    made.use_sampler("em", steps=5)
    made.use_sampler(temperature=0.9)
    assert (made.sampler.config.name, made.sampler.config.steps, made.sampler.config.temperature) == ("em", 5, 0.9)
    with pytest.raises(UserError, match="stps is not a field of 'em': did you mean 'steps'"):
        made.use_sampler(stps=5)


def test_dvae_itself_imports_nothing_heavy() -> None:
    code = "import sys, dvae; assert callable(dvae.load); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    assert not SAMPLERS.get("ode").lockstep
    with pytest.raises(UserError, match="sampler=ddim"):
        made.inpaint(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.ones(1, 1, 16, 16, dtype=torch.bool), 0)


def test_guidance_costs_passes(tiny: list[str]) -> None:
    made = pipeline(tiny, "denoiser.condition_dropout=0.1")
    assert (made.generate(2, 0), made.nfe)[1] == 2
    assert (made.generate(2, 0, guidance=Guidance(condition=3.0)), made.nfe)[1] == 4


def test_classes_are_drawn_evenly_or_as_asked_for(tiny: list[str]) -> None:
    made = pipeline(tiny, "classes=[a,b,c]", "data.label=kind", "denoiser.condition_label=true")
    assert made.sample_conditioning(5, 0, label=made.class_number("b")).label.tolist() == [1] * 5
    counts = torch.bincount(made.sample_conditioning(300, 0).label, minlength=3)
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
    words = ["denoiser.center=none", *WORDS[process]]
    made = pipeline(tiny, *words, *(["denoiser.mixed=true"] if process == "psld" else []))
    with torch.no_grad():
        made.models.denoiser.refiner.out[2].weight.zero_()
    images = torch.cat([torch.randint(120, 136, (2, 3, 16, 16)), torch.randint(0, 256, (2, 3, 16, 16))]).byte()
    bits = made.bits_per_dim(images, seed=0, tolerance=1e-3)
    x = to_float(images).double().flatten(1)
    nats = 0.5 * x.square().mean(1) + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(bits, nats / math.log(2) + math.log2(127.5), rtol=0, atol=0.02)
