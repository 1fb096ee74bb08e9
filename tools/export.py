"""Make a bundle of a checkpoint: python tools/export.py run=runs/x out=bundles/x [step=20000]"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="export",
    text="""Make a bundle of a checkpoint, during a training or after it.

  python tools/export.py run=runs/x out=bundles/x                    # the newest checkpoint of the refiner
  python tools/export.py run=runs/x out=bundles/x step=20000         # the checkpoint of this step
  python tools/export.py run=runs/x out=bundles/x average=false      # the weights themselves, not their average

- The other parts of the bundle, such as the encoder, are those of the run.
- The command needs no GPU, and one process is enough for a run of any number of ranks.""",
    settings=("dvae.training.export:ExportConfig",),
    bare="run",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Compose the words, write the bundle, and say of which step it is."""
    argv = ABOUT.arguments(argv)
    from dvae.config import compose
    from dvae.training import export

    settings: export.ExportConfig = compose.tool_settings(compose.compose("export", argv))
    step = export.export(settings)
    print(f"{settings.out}: the {settings.stage} of step {step}")


if __name__ == "__main__":
    run_command(command)
