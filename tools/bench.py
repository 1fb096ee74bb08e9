"""Run a benchmark: python tools/bench.py data|trainer|planner [key=value ...]"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import UserError, run_command

ABOUT = Command(
    name="bench",
    text="""Measure how fast images load, what the trainer adds to a step, or how accurate the planner is.

  python tools/bench.py data folder=PICTURES size=256      # image loading, with your own pictures
  python tools/bench.py data n=200 out=data.json           # with drawn pictures; writes the figures as JSON
  python tools/bench.py trainer run=runs/demo              # a training step of this run's refiner
  python tools/bench.py planner recipe=demo                # predicted and measured step times

- data compares dvae's shards and loader (PNG) with torchvision's ImageFolder and plain webdataset (JPEG) in images per
  second, and the decoders alone in milliseconds per image. All of them read the same pictures.
- trainer compares the trainer with the same network in a bare DeepSpeed loop and in bare PyTorch. It also measures
  how long a checkpoint delays the training.
- planner measures the peak speed of this machine, predicts the step times of small refiners as tools/plan.py does, and
  reports the error: docs/scale.md.

The methods of a benchmark take turns in one process. Compare ratios: other work on the machine changes the speeds.""",
    settings=(
        "dvae.experiments.bench.data_bench:DataBenchConfig",
        "dvae.experiments.bench.trainer_bench:TrainerBenchConfig",
        "dvae.experiments.bench.planner_bench:PlannerBenchConfig",
    ),
    subcommands=("data", "trainer", "planner"),
    bare_of={"data": "folder", "trainer": "run", "planner": "recipe"},
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Run the benchmark that the first word names, with the settings after it."""
    argv = ABOUT.arguments(argv)
    if argv[0] not in BENCHES:
        raise UserError(f"{argv[0]}: the first word names the benchmark: use {', '.join(BENCHES)}")
    BENCHES[argv[0]](argv[1:])


def data(words: list[str]) -> None:
    """Compare ways to load images."""
    from dvae.config import compose
    from dvae.experiments.bench import data_bench

    settings: data_bench.DataBenchConfig = compose.tool_settings(compose.compose("bench_data", words))
    print(data_bench.table(data_bench.run(settings)))


def trainer(words: list[str]) -> None:
    """Measure what the trainer adds to a step."""
    from dvae.config import compose
    from dvae.experiments.bench import trainer_bench

    settings: trainer_bench.TrainerBenchConfig = compose.tool_settings(compose.compose("bench_trainer", words))
    trainer_bench.run(settings)


def planner(words: list[str]) -> None:
    """Measure the error of the planner."""
    from dvae.config import compose
    from dvae.experiments.bench import planner_bench

    settings: planner_bench.PlannerBenchConfig = compose.tool_settings(compose.compose("bench_planner", words))
    print(planner_bench.run(settings))


BENCHES = {"data": data, "trainer": trainer, "planner": planner}

if __name__ == "__main__":
    run_command(command)
