"""Editing from Python: noise along the arc, what moves and what is kept, and the words of single calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import LATENT, WORDS, pipeline

import dvae
from dvae.diffusion.conditioning import Conditioning
from dvae.errors import UserError
from dvae.inference import editing
from dvae.inference.inference_core import ClassLabels, InferenceCore
from dvae.inference.noise import InterpolationSpace, KeyedNoise, SharedVariable, lerp, slerp
from dvae.inference.refine import refine_images
from dvae.registry.priors.base import PRIORS


def faces(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_arc_is_a_quarter_circle_between_unit_vectors() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for share in (0.0, 0.25, 1.0):
        angle = 0.5 * math.pi * share
        found = slerp(a, b, torch.tensor([share], dtype=torch.float64))
        torch.testing.assert_close(found, torch.tensor([[math.cos(angle), math.sin(angle)]]), atol=1e-7, rtol=0)
    parallel = slerp(a, 3 * a, torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(parallel, 2 * a)


def test_paths_end_exactly_and_the_arc_keeps_the_length_of_normal_noise() -> None:
    noise = KeyedNoise(5, [1] * 3, [2] * 3, [0.0, 0.5, 1.0]).sample("x_T", (3, 32, 32))
    ends = KeyedNoise(5, [1, 2]).sample("x_T", (3, 32, 32))
    assert torch.equal(noise[0], ends[0])
    assert torch.equal(noise[2], ends[1])
    assert noise[1].std().item() == pytest.approx(1.0, abs=0.03)
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.equal(lerp(ends, ends.flip(0), weights), ends[[0, 0]])


@pytest.mark.parametrize("process", ["vp", "psld"])
def test_given_images_have_the_same_bits_however_many(process: str, tiny: list[str]) -> None:
    made = pipeline(tiny, *WORDS[process], "train_refiner.precision=fp32", batch=None)
    images = faces(20)
    vae, refined = made.reconstruct(images, seed=2)
    assert refined is not None
    threads = torch.get_num_threads()
    for n in (1, 7, 17):
        torch.set_num_threads(3)
        vae_part, part = made.reconstruct(images[:n], seed=2)
        torch.set_num_threads(threads)
        assert torch.equal(vae_part, vae[:n])
        assert torch.equal(part, refined[:n])
    made.use_sampler("ode", tolerance=0.1)
    adaptive = made.reconstruct(images[:3], seed=2)[1]
    assert torch.equal(made.reconstruct(images[:1], seed=2)[1], adaptive[:1])


def test_a_direction_moves_z_by_so_much_and_nothing_else(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = pipeline(tiny, "train_refiner.precision=fp32", batch=None)
    images, vector = faces(3), torch.linspace(-1, 1, 8)
    seen: list[Conditioning] = []

    def recorded(
        core: InferenceCore, conditioning: Conditioning, noise: KeyedNoise, **words: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(conditioning)
        assert list(noise.numbers) == [0, 0, 1, 1, 2, 2]
        return refine_images(core, conditioning, noise, **words)

    monkeypatch.setattr(editing, "refine_images", recorded)
    strips = made.edit(images, vector, [0.0, 1.5], seed=4)
    z = made.encode(images).z
    (conditioning,) = seen
    assert torch.equal(conditioning.z[0::2], z)
    assert torch.equal(conditioning.z[1::2], z + 1.5 * vector)
    assert strips.shape == (3, 2, 3, 16, 16)
    monkeypatch.undo()
    assert torch.equal(strips[:, 0], made.reconstruct(images, seed=4)[1])
    assert torch.equal(made.edit(images, vector, 1.5, seed=4), strips[:, 1])
    assert torch.equal(made.edit([0, 1, 2], vector, 0.0, seed=4), made.generate(3, 4)[1])
    with pytest.raises(UserError, match=r"direction \(3,\) does not fit the z \(8,\)"):
        made.edit(images, torch.zeros(3), 1.0)


@pytest.mark.parametrize("steps", [3, 20])  # 20 do not fit into one chunk
def test_what_stays_and_what_goes_between_two_images(steps: int, tiny: list[str]) -> None:
    made = pipeline(tiny, "train_refiner.precision=fp32", batch=None)
    a, b = faces(4)[::2], faces(4)[1::2]
    plain = made.reconstruct(faces(4), seed=6)[1]
    assert plain is not None
    strips = {space: made.interpolate(a, b, space, steps, seed=6) for space in InterpolationSpace}
    for strip in strips.values():
        assert strip.shape == (2, steps, 3, 16, 16)
        assert torch.equal(strip[:, 0], plain[::2])
    assert torch.equal(strips[InterpolationSpace.both][:, -1], plain[1::2])
    assert not torch.equal(strips[InterpolationSpace.z][:, -1], plain[1::2])  # with the noise of the first
    assert not torch.equal(strips[InterpolationSpace.noise][:, -1], strips[InterpolationSpace.both][:, -1])
    assert torch.equal(made.interpolate(3, 5, "both", 2, seed=6)[0], made.generate(6, 6)[1][[3, 5]])


def test_z_goes_along_the_arc_where_the_prior_is_normal(tiny: list[str]) -> None:
    made = pipeline(tiny, "train_refiner.precision=fp32", batch=None)
    decoded: list[torch.Tensor] = []
    decode = made.decode
    made.decode = lambda z: (decoded.append(z), decode(z))[1]  # type: ignore[method-assign]
    for prior in ("gmm", "normal"):
        with made.using(prior=None if prior == "gmm" else prior):
            made.interpolate(0, 1, InterpolationSpace.z, 3, seed=1)
        middle, ends = decoded[-1][1], decoded[-1][[0, 2]]
        arc = slerp(ends[:1], ends[1:], torch.tensor([0.5], dtype=torch.float64))[0]
        torch.testing.assert_close(middle, arc if prior == "normal" else ends.mean(0))
        assert not torch.allclose(arc, ends.mean(0))


def test_latent_space_and_no_encoder_say_what_they_cannot(tiny: list[str]) -> None:
    latent = pipeline(LATENT, batch=None)
    vae, refined = latent.reconstruct(faces(2))
    assert refined is None
    moved = latent.edit(faces(2), torch.zeros(latent.models.shapes.latent), 1.0)
    assert torch.equal(moved, vae)
    assert torch.equal(latent.interpolate(0, 1, "noise", 2, seed=1)[0], latent.generate(2, 1)[1])
    with pytest.raises(UserError, match="space=z: this run draws no z besides its noise: use space=noise"):
        latent.interpolate(0, 1, "z")
    with pytest.raises(UserError, match="in latent space a given image has no noise"):
        latent.interpolate(*faces(2)[:, None])
    with pytest.raises(UserError, match="shared=z: this run draws no z"):
        latent.generate(2, 0, shared="z")
    plain = pipeline(
        [*tiny[:1], "image_size=16", "refiner.width=32", "refiner.multipliers=[1]", "refiner.attention_resolutions=[]"],
        "encoder=none", "prior=normal", "denoiser.condition_image=false", "denoiser.condition_latent=false",
        "denoiser.center=none", "sampler.steps=2",
        batch=None,
    )  # fmt: skip
    assert plain.interpolate(0, 1, "noise", 3).shape == (1, 3, 3, 16, 16)
    for call in (plain.reconstruct, lambda images: plain.edit(images, torch.zeros(0), 1.0)):
        with pytest.raises(UserError, match="this run has no encoder"):
            call(faces(1))


def test_words_of_one_call_leave_the_pipeline_as_it_was(tiny: list[str]) -> None:
    made = pipeline(tiny, "train_refiner.precision=fp32", batch=None)
    before = made.sampler, made.prior
    _, drawn = made.generate(2, 0, sampler="em", steps=3, temperature=0.5, prior="normal")
    assert made.nfe == 3
    assert (made.sampler, made.prior) == before
    with made.using("em", prior=PRIORS.build({"name": "normal"}, made.models.shapes), steps=3, temperature=0.5):
        assert torch.equal(made.generate(2, 0)[1], drawn)
    assert not torch.equal(made.generate(2, 0)[1], drawn)
    with pytest.raises(UserError, match="prior=gmm must be fitted"):
        made.generate(1, 0, prior="gmm")
    with pytest.raises(UserError, match="shared=x: known: noise, z"):
        made.generate(1, 0, shared="x")
    assert torch.equal(made.generate(3, 0, shared=SharedVariable.noise)[1][0], made.generate(1, 0)[1][0])


def test_refine_takes_what_decode_and_encode_give(tiny: list[str]) -> None:
    made = pipeline(tiny, "train_refiner.precision=fp32", batch=None)
    images = faces(3)
    conditioning = made.encode(images)
    assert torch.equal(made.decode(conditioning.z), conditioning.x_hat)
    assert torch.equal(made.refine(conditioning.x_hat, conditioning.z, seed=1), made.reconstruct(images, 1)[1])
    with pytest.raises(
        UserError, match=r"images are \(3, 3, 8, 8\) torch.uint8: this run takes \(n, 3, 16, 16\) uint8"
    ):
        made.reconstruct(images[:, :, ::2, ::2])


def test_classes_by_name_one_for_each(tiny: list[str]) -> None:
    words = ["classes=[a,b,c]", "data.label=kind", "denoiser.condition_label=true"]
    made = pipeline(tiny, *words, "denoiser.label_dropout=0.1", batch=None)
    told: dict[int, int] = {}
    conditioning_of = made.conditioning_of

    def watched(numbers: Sequence[int], seed: int, label: ClassLabels = None) -> Conditioning:
        given = conditioning_of(numbers, seed, label)
        assert given.label is not None
        told.update(zip(numbers, given.label.tolist(), strict=True))
        return given

    made.conditioning_of = watched  # type: ignore[method-assign]
    made.generate(3, 0, first=15, label=["a", 1, "c"])
    assert [told[number] for number in (15, 16, 17)] == [0, 1, 2]
    made.generate(1, 0, label="b")
    assert {told[number] for number in range(16)} == {1}
    with pytest.raises(UserError, match="2 labels for 3 images"):
        made.generate(3, 0, label=["a", "b"])
    with pytest.raises(UserError, match="label=3: the run has 3 classes"):
        made.generate(1, 0, label=3)
    for label, numbers in ((None, [-1, -1]), ("c", [2, 2]), (["b", 0], [1, 0])):
        given = editing.source_images(made, faces(2), 0, label).conditioning
        assert given.label is not None
        assert given.label.tolist() == numbers
    always = pipeline(tiny, *words)
    with pytest.raises(UserError, match="the refiner was not trained without a class: give label=NAME"):
        always.reconstruct(faces(1))


def test_pil_images(tmp_path: Path) -> None:
    images = faces(2)
    color, gray = dvae.pil(images), dvae.pil(images[:, :1])
    assert [image.mode for image in (*color, *gray)] == ["RGB", "RGB", "L", "L"]
    assert color[1].getpixel((5, 3)) == tuple(images[1, :, 3, 5].tolist())
    assert len(dvae.pil(images[0])) == 1
