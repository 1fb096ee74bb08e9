"""Use a trained run in a browser: python tools/page.py run=runs/demo"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="page",
    text="""Serve a page on this machine to use a trained run in a browser.

  python tools/page.py run=runs/demo                   # then open http://127.0.0.1:7860
  python tools/page.py run=runs/demo port=8000         # another port
  python tools/page.py run=runs/demo host=0.0.0.0      # other machines can use the page, too

The page draws images, moves them along directions that tools/directions.py has found, interpolates, and shows images
before and after refinement. Sampler and steps can be changed.

- There is no password. By default only this machine can reach the page. With host=0.0.0.0 every machine that reaches
  this one can use it.
- The page accepts no uploads, and only requests for its own address. With host=0.0.0.0 it accepts any host name.
- It needs the extra `page`: pip install 'dvae[page]'.""",
    settings=("dvae.app.page:PageConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Compose the words and serve."""
    argv = ABOUT.arguments(argv)
    from dvae.app import page
    from dvae.config import compose

    page.serve(compose.tool_settings(compose.compose("page", argv)))


if __name__ == "__main__":
    run_command(command)
