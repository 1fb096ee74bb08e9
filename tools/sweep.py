"""Try settings with a W&B sweep file: python tools/sweep.py sweep=demo n=6 parallel=2"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.config.launch_help import yaml_names
from dvae.errors import run_command

ABOUT = Command(
    name="sweep",
    text=f"""Run the trials of a W&B sweep file on this machine, without a server.

  python tools/sweep.py sweep=demo n=6 parallel=2                          # into runs/sweep-demo
  python tools/sweep.py sweep=mine.yaml n=20 out=runs/mine                 # your own sweep file
  python tools/sweep.py sweep=demo train_refiner.steps=200 schedule=linear # settings of all trials

- sweep= takes a name ({", ".join(yaml_names("sweep"))}) or a YAML file. Its methods are grid, random and bayes, with
  hyperband; W&B's own engine draws the settings.
- Each trial is a run of tools/launch.py in OUT/trial-0001, OUT/trial-0002, ... Other words are settings of every trial.
- The same command resumes after an interruption, until n trials are finished. It then writes OUT/trials.csv and
  OUT/parallel.png.
- W&B is off, also if the sweep file enables it. tracking.wandb.mode=offline keeps W&B's files, too.
- With W&B's server, use `wandb sweep FILE.yaml` and `wandb agent`: docs/sweeps.md.""",
    settings=("dvae.experiments.sweeps.sweep_loop:SweepToolConfig",),
    bare="sweep",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Split the sweep's settings from the overrides of its trials, run it, and show the table."""
    argv = ABOUT.arguments(argv)
    from dvae.config.tool_arguments import split_arguments
    from dvae.experiments.sweeps import parallel_coordinates, sweep_loop, trial_table

    settings, overrides = split_arguments(sweep_loop.SweepToolConfig, argv)
    found, folder, trials = sweep_loop.sweep(overrides, settings)
    trial_table.write(trials, found, folder.path / "trials.csv")
    parallel_coordinates.draw(trials, found, folder.path / "parallel.png")
    print(trial_table.text(trials, found))
    print(trial_table.closing_line(trials, settings.n, folder.path))


if __name__ == "__main__":
    run_command(command)
