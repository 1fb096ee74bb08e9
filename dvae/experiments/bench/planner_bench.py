"""Measure the error of the planner's step times with small refiners on this machine.

1. The peak is measured with a matrix product and a convolution in bf16.
2. The efficiency is computed from the measured step time of the first refiner.
3. The step times of the other refiners are predicted with this efficiency and compared with measurements.

The steps of all refiners alternate. Seconds are CPU time divided by the number of threads, so that waiting for other
processes does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore

from dvae.config.schema import Precision
from dvae.data.loading.loader import Batch
from dvae.errors import UserError
from dvae.experiments.bench.trainer_bench import WARM_UP, time_alternating
from dvae.models import components
from dvae.planning import counting, passes
from dvae.planning.counting import Operations
from dvae.planning.plan_run import compose_recipe
from dvae.stages.latent_sources import EncodedLatents
from dvae.stages.refiner import RefinerTask
from dvae.training.engine.deepspeed_engine import Engine, start_distributed
from dvae.training.engine.malloc_options import keep_freed_memory
from dvae.utils.text_tables import markdown_table

SIDE = 1024
"""Rows and columns of the matrices whose product measures the peak."""
CHANNELS, MAP, IMAGES = 128, 32, 8
"""Channels, height and width, and batch size of the convolution that measures the peak."""
TRIES = 5
"""Number of measurements of a peak, after the warm-up."""


@dataclass(kw_only=True, slots=True)
class PlannerBenchConfig:
    """Settings of `python tools/bench.py planner`."""

    recipe: str = "demo"
    """Recipe whose refiner is small enough for this machine. Its networks have their initial weights."""
    widths: list[int] = field(default_factory=lambda: [64, 32, 96])
    """Two or more values of refiner.width. The first one sets the efficiency with which the others are predicted."""
    batch: int = 16
    """Images in a step."""
    steps: int = 8
    """Measured steps of each refiner, after the warm-up."""


ConfigStore.instance().store(name="bench_planner_schema", node=PlannerBenchConfig, provider="dvae")


@dataclass(frozen=True)
class Row:
    """Measurement and prediction for one refiner."""

    word: str
    """The override that selects the refiner."""
    operations: int
    """Floating-point operations of a step."""
    measured: float
    """Median CPU seconds of a step, divided by the number of threads."""
    predicted: float
    """Predicted seconds of a step."""

    @property
    def error(self) -> float:
        """Relative error of the prediction: 0.1 means 10% more than measured."""
        return self.predicted / self.measured - 1.0


def run(settings: PlannerBenchConfig) -> str:
    """Measure the refiners, compare them with predictions, and return a table as text.

    Raises UserError if there are fewer than two widths.
    """
    if len(settings.widths) < 2:
        raise UserError(f"widths={settings.widths}: use two or more, the first is what the others are predicted from")
    keep_freed_memory()
    start_distributed()
    words = [f"refiner.width={width}" for width in settings.widths]
    operations = {word: step_operations(settings, word) for word in words}
    steps = {word: a_step(settings, word) for word in words}
    matrices, convolutions = peaks()
    times = time_alternating(steps, settings.steps, timed)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return table(rows(words, operations, seconds, (matrices, convolutions)), matrices, convolutions)


def timed(work: Callable[[], object]) -> float:
    """Run `work` and return its CPU seconds divided by the number of threads."""
    began = time.process_time()
    work()
    return (time.process_time() - began) / torch.get_num_threads()


def rows(
    words: list[str], operations: dict[str, Operations], seconds: dict[str, float], peak: tuple[float, float]
) -> list[Row]:
    """Return a row per refiner, with predictions from the efficiency of the first one.

    `peak` holds the operations per second of matrix products and of convolutions.
    """

    def ideal(word: str) -> float:
        return operations[word].products / peak[0] + operations[word].convolutions / peak[1]

    efficiency = ideal(words[0]) / seconds[words[0]]
    return [Row(word, operations[word].total, seconds[word], ideal(word) / efficiency) for word in words]


def step_operations(settings: PlannerBenchConfig, word: str) -> Operations:
    """Count the operations of a step as the planner does."""
    config = compose_recipe([f"recipe={settings.recipe}", word])
    one = passes.refiner_pass(components.build_models_on_meta(config), encodes=True, decodes=True)
    found = counting.count_pass(one, settings.batch, config.training("refiner").precision is Precision.bf16)
    return found.frozen + found.trained


def a_step(settings: PlannerBenchConfig, word: str) -> Callable[[], object]:
    """Return a function that runs one training step of a refiner on random images."""
    config = compose_recipe([f"recipe={settings.recipe}", word, f"train_refiner.batch={settings.batch}"])
    made, training = components.build_models(config), config.training("refiner")
    latents = EncodedLatents(made.encoder)
    stage = RefinerTask(made.encoder, made.denoiser, latents, training, config.seed, torch.device("cpu"))
    engine, keys = Engine(made.denoiser, training), torch.arange(settings.batch)
    shape = (settings.batch, config.channels, config.image_size, config.image_size)
    batch = Batch(keys, keys, torch.randint(0, 256, shape, dtype=torch.uint8))

    def step() -> None:
        engine.backward(stage.loss("refiner", {"refiner": engine}, batch).loss)
        engine.step(1)

    return step


def peaks() -> tuple[float, float]:
    """Measure the bf16 operations per second of a matrix product and of a channels-last 3x3 convolution."""
    a = torch.randn(SIDE, SIDE, dtype=torch.bfloat16)
    x = torch.randn(IMAGES, CHANNELS, MAP, MAP, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    w = torch.randn(CHANNELS, CHANNELS, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    products = best(lambda: a @ a, 2 * SIDE**3)
    return products, best(lambda: F.conv2d(x, w, padding=1), 2 * IMAGES * MAP * MAP * CHANNELS**2 * 9)


def best(work: Callable[[], object], operations: int) -> float:
    """Return the operations per second of the fastest of several measurements."""
    return max(operations / timed(work) for _ in range(WARM_UP + TRIES))


def table(found: list[Row], matrices: float, convolutions: float) -> str:
    """Return the measured peaks in operations per second, and the rows as a Markdown table."""
    peak = (
        f"measured peak, bf16, {torch.get_num_threads()} threads: {matrices / 1e9:.0f} GFLOP/s matrix product, "
        f"{convolutions / 1e9:.0f} convolution"
    )
    rows = [
        [
            f"`{row.word}`", f"{row.operations / 1e9:.1f}", f"{1000 * row.measured:.0f}",
            f"{row.operations / row.measured / 1e9:.0f}", f"{1000 * row.predicted:.0f}",
            f"{100 * row.error:+.0f}%" if number else "sets the efficiency",
        ]
        for number, row in enumerate(found)
    ]  # fmt: skip
    header = ["refiner", "GFLOP a step", "measured ms", "GFLOP/s", "predicted ms", "error"]
    return f"{peak}\n\n{markdown_table(header, rows)}"
