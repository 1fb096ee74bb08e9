"""Train a run: python tools/launch.py recipe=demo [run=runs/demo] [key=value ...]"""

from __future__ import annotations

import warnings
from pathlib import Path

from dvae.errors import run_command

USAGE = """usage: python tools/launch.py recipe=NAME [run=FOLDER] [key=value ...]

Trains the recipe, stage by stage, into the run folder (default runs/NAME). The same command again resumes it.

  recipe=NAME            {recipes}
  run=FOLDER             where everything about this run is kept
  stages=[encoder,...]   some of: {stages}
  source=folder source.path=DIR image_size=64
                         train on your own images
  refiner.width=96       set any field of any component
  schedule=cosine        swap a component ({kinds})
  launcher=processes launcher.ranks=2
                         train on that many processes of this machine (torchrun works too)
  launcher=slurm launcher.nodes=2 launcher.gpus_per_node=8
                         train as a job on SLURM (docs/cluster.md)
  plugins=[my_module]    import modules that register components
  dry_run=true           print the resolved config, stages and parameter counts; write nothing
  --multirun seed=1,2    a run for every combination, one after the other, in run=FOLDER/0, /1, ...; tools/sweep.py
                         does more

`python tools/components.py` lists the components with their fields."""


def command(argv: list[str]) -> None:
    """Compose the config from the words of argv, check it, and run it."""
    silence()
    from dvae.config import compose
    from dvae.config.recipe_files import recipe_names
    from dvae.experiments.sweeps import multirun
    from dvae.registry.discovery import chosen_kinds, load_plugins
    from dvae.registry.stages.base import STAGES
    from dvae.runs import dry_run, folder, launch_checks

    if any(word in ("-h", "--help") for word in argv):
        load_plugins(compose.plugins_of(argv))
        stages = ", ".join(STAGES.order())
        print(USAGE.format(recipes=", ".join(recipe_names()), stages=stages, kinds=", ".join(chosen_kinds())))
        return
    if any(word in multirun.FLAGS for word in argv):
        multirun.run([word for word in argv if word not in multirun.FLAGS])
        return
    composed = compose.compose("train", argv)
    checked = launch_checks.check_launch(composed)
    if checked.config.dry_run:
        print(dry_run.describe(checked))
    elif checked.under_way:
        checked.launcher.attach(Path(checked.config.run))
    else:
        path = folder.submit(composed).path if checked.first else Path(checked.config.run)
        checked.launcher.launch(path)


def silence() -> None:
    """Before anything is imported that warns."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about each other


if __name__ == "__main__":
    run_command(command)
