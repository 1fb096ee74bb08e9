"""An average of any width, after training: python tools/ema.py run=runs/x width=0.15 bundle=bundles/x-0.15"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/ema.py run=FOLDER width=WIDTH [stage=refiner] [step=STEP] [out=FILE.safetensors]
       [bundle=FOLDER]

Makes the moving average of a stage's weights that a power profile of this width (standard deviation relative to the
training so far, 0.005 to 0.28) would have given at this step (the last one), from snapshots of two other widths:
train with train_refiner.ema.extra_widths=[0.05,0.1] train_refiner.ema.snapshot_every=1000.
out= is a weights file, bundle= a bundle with the run's other parts, for tools/sample.py and all else that takes a run.
decay=NUMBER instead of width= takes out an average of train_refiner.ema.extra_decays."""

POOR = 0.05
"""Relative error of a profile from which on a hint is printed."""


def command(argv: list[str]) -> None:
    """Compose the words, make the average, and say how near its profile is."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
    from dvae.config import compose
    from dvae.training import ema_from_snapshots

    settings: ema_from_snapshots.EmaToolConfig = compose.tool_settings(compose.compose("ema", argv))
    fit = ema_from_snapshots.build_average(settings)
    kind = "width" if settings.decay is None else "decay"
    print(
        f"{settings.stage}: {kind} {getattr(settings, kind):g} at step {fit.step}, from {len(fit.snapshots)} "
        f"snapshots; relative error of its profile {fit.error:.1e}"
    )
    if fit.error > POOR:
        steps = sorted({one.step for one in fit.snapshots})
        print(f"that is a poor fit: take one of the steps {steps}, a width nearer to those kept, or more snapshots")
    for path in filter(None, (settings.out, settings.bundle)):
        print(path)


if __name__ == "__main__":
    run_command(command)
