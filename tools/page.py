"""Play with a trained run in a browser: python tools/page.py run=runs/demo"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/page.py run=FOLDER [port=7860] [host=127.0.0.1]

Serves a page on this machine: draw images, move them along directions that tools/directions.py has found, interpolate,
compare what comes before refinement with what comes after, change sampler and steps. run= takes a run folder or a
bundle. Nobody else reaches it unless host= says so; there is no password. It accepts no uploads, and requests for its
own address alone; host=0.0.0.0 answers under any name."""


def command(argv: list[str]) -> None:
    """Compose the words and serve."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    from dvae.app import page
    from dvae.config import compose

    page.serve(compose.tool_settings(compose.compose("page", argv)))


if __name__ == "__main__":
    run_command(command)
