"""Try settings: python tools/sweep.py sweep=demo n=6 parallel=2 [out=runs/sweep-demo] [key=value ...]"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/sweep.py sweep=NAME|FILE.yaml [n=8] [parallel=1] [out=runs/sweep-NAME] [failures=3]
       [key=value ...]

Runs a W&B sweep file on this machine, without a server, by W&B's own engine: grid, random or bayes, and hyperband.
Each trial is a run of tools/launch.py in out/trial-0001, ...; words like train_refiner.steps=200 go to all of them.
The same command again goes on, up to `n` finished trials. At the end: out/trials.csv and out/parallel.png.

  sweep=NAME             {sweeps}
  tracking.wandb.mode=offline
                         keep W&B's files too (off here, whatever the sweep file says)

With W&B's server: wandb sweep recipes/sweep/NAME.yaml, then wandb agent ... ; docs/sweeps.md"""


def command(argv: list[str]) -> None:
    """Split the sweep's settings from the overrides of its trials, run it, and show the table."""
    from dvae.config.recipe_files import recipe_names
    from dvae.config.tool_arguments import split_arguments
    from dvae.experiments.sweeps import parallel_coordinates, sweep_loop, trial_table

    if any(word in ("-h", "--help") for word in argv):
        print(USAGE.format(sweeps=", ".join(recipe_names("sweep"))))
        return
    settings, overrides = split_arguments(sweep_loop.SweepToolConfig, argv)
    found, folder, trials = sweep_loop.sweep(overrides, settings)
    trial_table.write(trials, found, folder.path / "trials.csv")
    parallel_coordinates.draw(trials, found, folder.path / "parallel.png")
    print(trial_table.text(trials, found))
    print(trial_table.closing_line(trials, settings.n, folder.path))


if __name__ == "__main__":
    run_command(command)
