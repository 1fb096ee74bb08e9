"""Look after runs: python tools/runs.py [list] [in=runs], follow run=RUN, cancel run=RUN, resume run=RUN"""

from __future__ import annotations

from pathlib import Path

from dvae.errors import UserError, run_command, suggest

USAGE = """usage: python tools/runs.py [list] [in=runs]
       python tools/runs.py follow run=RUN
       python tools/runs.py cancel run=RUN
       python tools/runs.py resume run=RUN [trust=true]

list      all runs below a folder: running, finished, stopped, failed or waiting; stage, step, images/s, time left
follow    the figures of a run as they come, until it ends
cancel    have a run save and end, as SIGTERM does; twice: at once
resume    go on with a run by its own config, here, where its last attempt was made. If that config imports modules,
          runs commands, or uses addresses or variables of the environment, they are listed, and trust=true allows
          them: read them first if the folder is not your own"""
KEYS = {"list": "in", "follow": "run", "cancel": "run", "resume": "run"}


def command(argv: list[str]) -> None:
    """Do what the first word says."""
    from dvae.runs import manage

    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    trust = [word for word in argv if argv[0] == "resume" and word.startswith("trust=")]
    what, folder = parse([word for word in argv if word not in trust])
    if what == "list":
        lines = manage.run_table(folder)
    elif what == "resume":
        resume(folder, trusted(trust))
        return
    else:
        lines = manage.follow(folder) if what == "follow" else manage.cancel(folder)
    try:
        for line in lines:
            print(line, flush=True)
    except KeyboardInterrupt:
        print(f"{folder}: goes on without being watched")


def parse(argv: list[str]) -> tuple[str, Path]:
    """What to do, and with which folder."""
    what, *words = argv if argv and "=" not in argv[0] else ["list", *argv]
    if what not in KEYS:
        raise UserError(f"unknown word {what!r}: {suggest(what, KEYS)}")
    given = dict(word.split("=", 1) for word in words if "=" in word)
    odd = [word for word in words if word.partition("=")[0] != KEYS[what] or "=" not in word]
    if odd:
        raise UserError(f"{what}: unknown word {odd[0]!r}: use {KEYS[what]}=FOLDER")
    if what != "list" and "run" not in given:
        raise UserError(f"{what} needs a run: add run=FOLDER")
    return what, Path(given.get(KEYS[what], "runs"))


def trusted(words: list[str]) -> bool:
    """Whether the words allow what a run's settings reach for outside its folder."""
    if words not in ([], ["trust=true"], ["trust=false"]):
        raise UserError(f"{' '.join(words)}: use trust=true or trust=false, once")
    return words == ["trust=true"]


def resume(folder: Path, trust: bool) -> None:
    """As tools/launch.py does, without composing the settings again."""
    from dvae.config import stored
    from dvae.runs import manage
    from dvae.runs.folder import Run
    from dvae.runs.launch_checks import check_config
    from dvae.tools import launch

    manage.refuse_busy(folder)
    manage.enter_start_folder(folder := folder.absolute())
    run = Run(folder)
    reached = stored.outside(stored.read_plain(run.config_file))
    if reached and not trust:
        raise UserError(
            f"run={folder}: its config.yaml uses {'; '.join(reached)}: if that is what you want, add trust=true, or "
            "give the launch command again"
        )
    launch.silence()
    config = run.own_config()
    launcher, *_ = check_config(config)
    launcher.launch(Path(config.run))


if __name__ == "__main__":
    run_command(command)
