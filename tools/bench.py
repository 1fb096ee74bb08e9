"""Measurements: python tools/bench.py data folder=PICTURES size=256"""

from __future__ import annotations

from dvae.errors import UserError, run_command, suggest

USAGE = """usage: python tools/bench.py data [folder=PICTURES] [size=256] [n=1000] [batch=64] [threads=[0,1,2]]
       [rounds=3] [quality=90] [out=FILE.json]
       python tools/bench.py trainer [run=runs/demo] [steps=40]
       python tools/bench.py planner [recipe=demo] [widths=[64,32,96]] [batch=16] [steps=8]

data: images per second of our shards and loader, of ImageFolder with Pillow and ToTensor, and of plain webdataset, on
  the same pictures as JPEG (theirs) and PNG (ours); and milliseconds per image of the decoders alone. The pictures are
  those of a folder, or drawn. All ways take turns in one process with one thread of torch; compare ratios.
trainer: a step of a run's refiner, against the same network in a bare DeepSpeed loop and in bare torch, which take
  turns; and for how long a checkpoint holds training up.
planner: how far the step times that tools/plan.py would predict from this machine's measured peak are off, for small
  refiners: docs/scale.md."""


def command(argv: list[str]) -> None:
    """Measure what the first word says, with the words after it."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(USAGE)
    elif argv[0] in BENCHES:
        BENCHES[argv[0]](argv[1:])
    else:
        raise UserError(f"unknown word {argv[0]!r}: {suggest(argv[0], BENCHES)}")


def data(words: list[str]) -> None:
    """Ways to load images."""
    from dvae.config import compose
    from dvae.experiments.bench import data_bench

    settings: data_bench.DataBenchConfig = compose.tool_settings(compose.compose("bench_data", words))
    print(data_bench.table(data_bench.run(settings)))


def trainer(words: list[str]) -> None:
    """What the trainer adds to a step."""
    from dvae.config import compose
    from dvae.experiments.bench import trainer_bench

    settings: trainer_bench.TrainerBenchConfig = compose.tool_settings(compose.compose("bench_trainer", words))
    trainer_bench.run(settings)


def planner(words: list[str]) -> None:
    """How far the planner is off."""
    from dvae.config import compose
    from dvae.experiments.bench import planner_bench

    settings: planner_bench.PlannerBenchConfig = compose.tool_settings(compose.compose("bench_planner", words))
    print(planner_bench.run(settings))


BENCHES = {"data": data, "trainer": trainer, "planner": planner}

if __name__ == "__main__":
    run_command(command)
