"""List, follow, cancel or resume runs: python tools/runs.py [list|follow|cancel|resume] [run=RUN]"""

from __future__ import annotations

from pathlib import Path

from dvae.config.command_line import Command
from dvae.errors import UserError, run_command, suggest

KEYS = {"list": "in", "follow": "run", "cancel": "run", "resume": "run"}
ABOUT = Command(
    name="runs",
    text="""List all runs, or follow, cancel or resume one.

  python tools/runs.py                            # list the runs in runs/
  python tools/runs.py list in=/data/runs         # list the runs in another folder
  python tools/runs.py follow run=runs/demo       # print the figures of a run as they come
  python tools/runs.py cancel run=runs/demo       # let it save, then end
  python tools/runs.py resume run=runs/demo       # go on where it stopped

- list prints state (running, finished, stopped, failed or waiting), stage, step, images/s and time left of every run in
  the folder and its subfolders.
- follow prints the figures of a run until it ends. Ctrl-C ends the printing, not the run.
- cancel makes a run save a checkpoint and end, as SIGTERM does. If you cancel it twice, it ends at once.
- resume continues a run with the settings in its folder, on this machine. If these settings import modules, run
  commands, or use network addresses or environment variables, the command lists them and stops. Read them if somebody
  else made the folder. Then add trust=true to allow them.""",
    subcommands=tuple(KEYS),
    bare_of=KEYS,
)


def command(argv: list[str]) -> None:
    """Do what the first word says."""
    argv = ABOUT.arguments(argv)
    from dvae.runs import manage

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
