"""Compare arms of training with several seeds: python tools/study.py study=avatars out=runs/study"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.config.launch_help import yaml_names
from dvae.errors import run_command

ABOUT = Command(
    name="study",
    text=f"""Train the arms of a study with several seeds, and compare the quality of their samples.

  python tools/study.py study=avatars out=runs/study                   # the paper's comparison: docs/study.md
  python tools/study.py study=avatars seeds=[0,1,2,3] out=runs/study   # one more seed
  python tools/study.py study=mine.yaml out=runs/mine                  # your own study

- study= takes a name ({", ".join(yaml_names("study"))}) or a YAML file like the files in recipes/study. Its arms are
  lists of settings of tools/launch.py.
- The command trains an encoder for each seed and, with it, a refiner for each arm and seed. It draws n images of each
  refiner at each number of steps. It scores them by KID-lite0, beside the VAE's samples and real images.
- The results are study.md and study.png in the folder of out=.
- The same command resumes after an interruption, and does not repeat what is finished. Seeds and steps can be added
  later. To change anything else, use another out=.""",
    settings=("dvae.experiments.study.study_spec:StudyConfig",),
    bare="study",
)


def command(argv: list[str]) -> None:
    """Run the study, and show its table."""
    argv = ABOUT.arguments(argv)
    from dvae.experiments.study import study_report, study_runs, study_spec

    settings = study_spec.read_study(argv)
    found = study_runs.run_study(settings)
    print(study_report.write(settings, *found))
    print(f"{settings.out}/study.md and study.png")


if __name__ == "__main__":
    run_command(command)
