"""Encoders, refiners, processes, schedules, samplers: every two that can meet do, in a run; the others are refused.

Taken from the registries, so that a new component is covered.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from covering import Row, covering, pairs
from shrink import SIZE, small

from dvae.config import compose
from dvae.config.model_config import model_config
from dvae.config.schema import Precision, RunConfig
from dvae.data.loading.loader import Batch
from dvae.diffusion.denoiser import Center
from dvae.diffusion.objective import PredictionType
from dvae.errors import UserError
from dvae.inference.noise import KeyedNoise
from dvae.inference.pipeline import Pipeline
from dvae.inference.refine import refine_images
from dvae.models import components
from dvae.registry.core import ComponentConfig, Registry, Shapes
from dvae.registry.encoders.base import ENCODERS
from dvae.registry.processes.base import PROCESSES
from dvae.registry.refiners.base import REFINERS
from dvae.registry.samplers.base import SAMPLERS
from dvae.registry.schedules.base import SCHEDULES
from dvae.registry.stages.base import with_settings
from dvae.stages.encoder import EncoderStage, build_encoder_task
from dvae.stages.latent_sources import EncodedLatents
from dvae.stages.refiner import RefinerStage, RefinerTask
from dvae.training.train_task import TrainTask

IMAGES = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SHAPES = Shapes(image_size=SIZE)
CPU = torch.device("cpu")


@cache
def plain() -> RunConfig:
    """A run without the choices that are tried here."""
    words = [f"image_size={SIZE}", "encoder=none", "prior=normal", "refiner=flat_resnet", "denoiser.data_scale=1"]
    settings = compose.to_run_config(
        compose.compose("train", ["recipe=demo", *words, "denoiser.condition_latent=false"])
    )
    training = replace(settings.training("refiner"), precision=Precision.fp32, batch=2)
    return with_settings(settings, RefinerStage.Config(train_refiner=training))


@cache
def chosen(registry: Registry, name: str) -> ComponentConfig:
    fields = {"steps": 2} if registry is SAMPLERS else {}
    return registry.config({**small(registry.kind, name), **fields})


@cache
def latent_shape(encoder: str) -> tuple[int, ...]:
    with torch.device("meta"):
        return ENCODERS.build(chosen(ENCODERS, encoder), SHAPES).latent_shape


@cache
def zero_terminal_snr(schedule: str) -> bool:
    return SCHEDULES.build({"name": schedule}, SHAPES).zero_terminal_snr


def settings_of(row: Row) -> RunConfig:
    """The run of a row (encoder, refiner, process, schedule, sampler), given whatever the encoder has to give.

    The prediction type and the center are no columns: they change from row to row as far as they are defined.
    """
    encoder, refiner, process, schedule, sampler = row
    known = 0 not in latent_shape(encoder)
    turn = sum(map(ord, "".join(row)))
    types = [PredictionType.v, PredictionType.x0, PredictionType.eps]
    if process != "vp":
        types = [PredictionType.eps]
    elif zero_terminal_snr(schedule):
        types.remove(PredictionType.eps)
    denoiser = replace(
        plain().denoiser,
        prediction=types[turn % len(types)],
        center=list(Center)[turn % 3] if known else Center.none,
        condition_image=known,
        condition_latent=known,
    )
    return replace(
        plain(),
        encoder=chosen(ENCODERS, encoder),
        refiner=chosen(REFINERS, refiner),
        process=chosen(PROCESSES, process),
        schedule=chosen(SCHEDULES, schedule),
        sampler=chosen(SAMPLERS, sampler),
        denoiser=denoiser,
    )


@cache
def refusals() -> dict[Row, str]:
    """(process, schedule, sampler) -> what is said of it where it is refused, else nothing."""
    said = {}
    for row in product(PROCESSES.names(), SCHEDULES.names(), SAMPLERS.names()):
        try:
            components.build_models_on_meta(settings_of(("none", "flat_resnet", *row)))
            said[row] = ""
        except UserError as error:
            said[row] = str(error)
    return said


@cache
def rows() -> list[Row]:
    able = [row for row, said in refusals().items() if not said]
    return covering([(*nets, *row) for nets in product(ENCODERS.names(), REFINERS.names()) for row in able])


def take_a_step(stage: TrainTask) -> None:
    """One step of each of the stage's modules, after which something of each has moved."""
    batch = Batch(2 + torch.arange(2), torch.arange(2), IMAGES)  # the second step: an adversary is heard
    modules = stage.modules()
    for name, module in modules.items():
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        before = [p.detach().clone() for p in module.parameters()]
        loss = stage.loss(name, modules, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after = list(module.parameters())
        assert loss.isfinite()
        assert all(p.isfinite().all() for p in after)
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("encoder", [name for name in ENCODERS.names() if name != "none"])
def test_every_encoder_takes_a_step(encoder: str) -> None:
    settings = replace(plain(), encoder=chosen(ENCODERS, encoder))
    made = components.build_models(settings).encoder
    training = EncoderStage.Config(train_encoder=settings.training("refiner"))
    take_a_step(build_encoder_task(made, with_settings(settings, training)))


@pytest.mark.parametrize("refiner", REFINERS.names())
@pytest.mark.parametrize("encoder", ENCODERS.names())
def test_what_fits_trains_and_samples(encoder: str, refiner: str) -> None:
    mine = [row for row in rows() if row[:2] == (encoder, refiner)]
    assert mine
    for row in mine:
        settings = settings_of(row)
        made = components.build_models(settings)
        training = settings.training("refiner")
        take_a_step(RefinerTask(made.encoder, made.denoiser, EncodedLatents(made.encoder), training, 0, CPU))
        for module in made.trained_parts().values():
            module.eval().requires_grad_(False)
        pipeline = Pipeline(model_config(settings), made, batch=2)
        x = refine_images(pipeline, pipeline.sample_conditioning(2, seed=1), KeyedNoise(1, range(2)))[0]
        assert x.shape == IMAGES.shape, row
        assert x.isfinite().all(), row
        assert pipeline.nfe >= 2, row


def test_what_does_not_fit_is_refused_with_its_reason() -> None:
    refused = {row: said for row, said in refusals().items() if said}
    assert refused
    for (process, schedule, sampler), said in refused.items():
        assert "\n" not in said
        assert f"schedule={schedule}" in said, said
        assert f"process={process}" in said, said
        assert f"sampler={sampler}" in said or "B is infinite" in said, said


def test_every_two_that_can_meet_do() -> None:
    met = set().union(*map(pairs, rows()))
    able = [row for row, said in refusals().items() if not said]
    for nets in product(ENCODERS.names(), REFINERS.names()):
        assert all(pairs((*nets, *row)) <= met for row in able)
    for column, registry in enumerate((ENCODERS, REFINERS, PROCESSES, SCHEDULES, SAMPLERS)):
        assert {row[column] for row in rows()} == set(registry.names())


def test_covering_is_small() -> None:
    """Ten columns of two values need 6 rows at least; of three by three by three, nine are enough to find."""
    assert 6 <= len(covering(list(product("ab", repeat=10)))) <= 10
    squares = covering(list(product("abc", repeat=3)))
    assert 9 <= len(squares) <= 11
    assert squares[0] == ("a", "a", "a")
    assert covering([("a", "a"), ("b", "b")]) == [("a", "a"), ("b", "b")]
