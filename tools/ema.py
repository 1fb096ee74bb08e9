"""Make an average of the weights after training: python tools/ema.py run=runs/x width=0.15 bundle=FOLDER"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command

ABOUT = Command(
    name="ema",
    text="""Make a moving average (EMA) of any width from the snapshots of a training.

  python tools/ema.py run=runs/x width=0.15 bundle=bundles/x-0.15          # a bundle with this average
  python tools/ema.py run=runs/x width=0.1 step=20000 out=ema.safetensors  # a weights file, at an earlier step
  python tools/ema.py run=runs/x decay=0.999 bundle=bundles/x-decay        # an average of ema.extra_decays, as it is

- The training must have kept snapshots of averages with two other widths. Train with
  train_refiner.ema.extra_widths=[0.05,0.1] train_refiner.ema.snapshot_every=1000.
- width is the standard deviation of the power profile, relative to the length of the training so far: docs/ema.md.
- The command prints the relative error of the reconstructed profile. If it is large, it suggests other steps.
- Every command that takes a run also takes the bundle.""",
    settings=("dvae.training.ema_from_snapshots:EmaToolConfig",),
    bare="run",
    needs_words=True,
)

POOR = 0.05
"""Relative error of a profile from which on a hint is printed."""


def command(argv: list[str]) -> None:
    """Compose the words, make the average, and say how near its profile is."""
    argv = ABOUT.arguments(argv)
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
