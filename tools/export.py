"""A bundle of a checkpoint: python tools/export.py run=runs/x out=bundles/x [step=20000]"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/export.py run=FOLDER out=BUNDLE [stage=refiner] [step=STEP] [average=true]

Makes a bundle of what a checkpoint holds (the newest, or that of a step), with the run's other parts: while it trains,
or after. It needs neither a GPU nor the ranks that trained it. average=false takes the weights themselves."""


def command(argv: list[str]) -> None:
    """Compose the words, write the bundle, and say of which step it is."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    from dvae.config import compose
    from dvae.training import export

    settings: export.ExportConfig = compose.tool_settings(compose.compose("export", argv))
    step = export.export(settings)
    print(f"{settings.out}: the {settings.stage} of step {step}")


if __name__ == "__main__":
    run_command(command)
