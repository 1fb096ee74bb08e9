"""Train a run: python tools/launch.py recipe=demo [run=runs/demo] [key=value ...]"""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points
from pathlib import Path

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="launch",
    text="""Train a recipe, stage by stage, into a run folder.

  python tools/launch.py recipe=demo                                    # into runs/demo
  python tools/launch.py recipe=demo run=runs/mine source=folder source.path=DIR    # your own images
  python tools/launch.py recipe=demo refiner.width=96 schedule=cosine   # any field, any component
  python tools/launch.py recipe=/path/to/mine.yaml dry_run=true         # print what would be done, write nothing
  python tools/launch.py recipe=avatars launcher=processes launcher.ranks=2         # two processes on this machine
  python tools/launch.py recipe=celebahq256 launcher=slurm launcher.nodes=2         # a SLURM job: docs/cluster.md
  python tools/launch.py recipe=demo --multirun seed=1,2                # one run after the other, for each combination

The same command again resumes the run. Ctrl-C saves a checkpoint first.""",
    bare="recipe",
    flags=("--multirun", "-m"),
)


def command(argv: list[str]) -> None:
    """Compose the config from the words of argv, check it, and run it."""
    if any(word in ("-h", "--help") for word in argv):
        ABOUT.end(f"{ABOUT.help()}\n\n{launch_help(argv)}")
    argv = ABOUT.arguments(argv)
    silence()
    from dvae.config import compose
    from dvae.experiments.sweeps import multirun
    from dvae.runs import dry_run, folder, launch_checks

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


def launch_help(argv: list[str]) -> str:
    """What there is to choose from.

    Components of plug-ins are listed only if a plug-in is installed or named: they must be imported, which takes time.
    """
    from dvae.config.launch_help import launch_sections, yaml_names

    text = launch_sections()
    if not entry_points(group="dvae.plugins") and not any(word.startswith("plugins=") for word in argv):
        return text
    from dvae.config.compose import plugins_of
    from dvae.config.recipe_files import recipe_names
    from dvae.registry.discovery import load_plugins, registries

    load_plugins(plugins_of(argv))
    brought = [f"{kind} {name}" for kind, registry in registries().items() for name in registry.names()
               if not registry.get(name).__module__.startswith("dvae.")]  # fmt: skip
    brought += [f"recipe {name}" for name in recipe_names() if name not in yaml_names("recipe")]
    heading = "From plug-ins (`python tools/components.py KIND NAME plugins=[...]` shows the fields)"
    return "\n".join([text, "", f"{heading}:", *(f"  {name}" for name in brought or ["nothing"])])


def silence() -> None:
    """Before anything is imported that warns."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about each other


if __name__ == "__main__":
    run_command(command)
