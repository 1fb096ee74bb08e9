"""Train a run: python tools/launch.py recipe=demo [run=runs/demo] [key=value ...]"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from dvae.errors import UserError, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dvae.config.schema import RunConfig

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
    from dvae.config import compose, stored, validate
    from dvae.config.recipe_files import recipe_names
    from dvae.experiments.sweeps import multirun
    from dvae.registry.discovery import registries
    from dvae.runs import folder as run

    if any(word in ("-h", "--help") for word in argv):
        print(
            USAGE.format(
                recipes=", ".join(recipe_names()), stages=", ".join(compose.STAGES), kinds=", ".join(registries())
            )
        )
        return
    if any(word in multirun.FLAGS for word in argv):
        multirun.run([word for word in argv if word not in multirun.FLAGS])
        return
    composed = compose.compose("train", argv)
    settings = compose.to_run_config(composed)
    if settings.dry_run:
        print(validate.describe(composed))
        return
    stored.stored(composed)  # refuses secrets that would be written down
    check(settings)
    first = os.environ.get("RANK", "0") == "0"
    if first and under_way(composed, settings):
        return
    start(settings, run.submit(composed).path if first else Path(settings.run))


def silence() -> None:
    """Before anything is imported that warns."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about each other


def check(settings: RunConfig) -> None:
    """Refuse what can be known to be wrong on the ranks that there will be."""
    from dvae.config import validate
    from dvae.registry.launchers.base import DEFAULT, launcher_of

    launcher = launcher_of(settings.launcher)
    if "RANK" in os.environ and launcher.config.name != DEFAULT:  # this is one of several ranks already
        name = launcher.config.name
        raise UserError(f"launcher={name}: torchrun has started the ranks already: leave launcher={name} out")
    validate.check(settings, launcher.ranks)


def under_way(composed: DictConfig, settings: RunConfig) -> bool:
    """Wait for this very run where it is under way, and its launcher can; False where nobody works in its folder.

    Raises UserError where somebody does.
    """
    from dvae.registry.launchers.base import launcher_of
    from dvae.runs import folder as run
    from dvae.runs import manage

    folder = Path(settings.run)
    if (folder / "config.yaml").exists():
        run.refuse_other(run.Run(folder), composed)
        if launcher_of(settings.launcher).attach(folder):
            return True
    manage.refuse_busy(folder)
    return False


def start(settings: RunConfig, folder: Path) -> None:
    """Take a run folder through its stages, by the launcher that its config names."""
    from dvae.registry.launchers.base import launcher_of

    launcher_of(settings.launcher).launch(folder)


if __name__ == "__main__":
    run_command(command)
