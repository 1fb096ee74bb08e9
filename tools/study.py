"""Compare arms of training with several seeds: python tools/study.py study=avatars out=runs/study"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/study.py [study=avatars] [out=runs/study] [seeds=[0,1,2]] [steps=[5,10,25,50,100]]
       [n=500]

Trains an encoder per seed and, over it, a refiner per arm and seed; draws n images of each at several numbers of steps,
scores them (KID-lite0) beside the VAE alone and real images, and writes out/study.md and out/study.png. study= is one
of recipes/study, or a YAML file like them: its arms are words that tools/launch.py takes. What is there already is not
made again, so the same command goes on where it was ended. More seeds and steps may be added; anything else needs
another out=."""


def command(argv: list[str]) -> None:
    """Run the study, and show its table."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    from dvae.experiments.study import study_report, study_runs, study_spec

    settings = study_spec.read_study(argv)
    found = study_runs.run_study(settings)
    print(study_report.write(settings, *found))
    print(f"{settings.out}/study.md and study.png")


if __name__ == "__main__":
    run_command(command)
