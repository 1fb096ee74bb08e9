"""Replay a step with a non-finite gradient: python tools/replay.py bundle=runs/x/nonfinite-refiner-00000012"""

from __future__ import annotations

from typing import Any

from dvae.config.command_line import Command
from dvae.errors import UserError, run_command

ABOUT = Command(
    name="replay",
    text="""Repeat a training step that was skipped because a gradient was not finite, and print what differs.

  python tools/replay.py bundle=runs/x/nonfinite-refiner-00000012
  python tools/replay.py runs/x/nonfinite-refiner-00000012 shards=/data/shards      # if the shards were moved

- The step is computed up to its gradients, in one process, with the recorded weights, samples and random draws.
- The command prints loss, other figures and gradient norms by layer, as recorded and as computed now. It names the
  first layer whose output is not finite, and says if the step is reproduced.
- Nothing in the run folder is changed.""",
    settings=("dvae.runs.replay:ReplayConfig",),
    bare="bundle",
    needs_words=True,
)


def command(argv: list[str]) -> None:
    """Compose the words, replay, and print what was found."""
    argv = ABOUT.arguments(argv)
    from omegaconf import OmegaConf

    from dvae.config import compose
    from dvae.runs import replay

    words = compose.compose("replay", argv)
    if OmegaConf.is_missing(words, "bundle"):
        raise UserError("bundle= is not set: name a folder nonfinite-STAGE-STEP of a run")
    result = replay.replay(words.bundle, words.shards)
    record = result.recorded
    print(f"{record['stage']} step {record['step']}, samples {record['samples'][0]} to {record['samples'][-1]}")
    for kind, title in (("figures", "figure, mean over the batch"), ("gradient_norms", "gradient norm")):
        print(f"\n{title:<60} {'recorded':>12} {'now':>12}")
        for name in result.recorded[kind] | result.now[kind]:
            print(f"{name:<60} {number(record[kind].get(name)):>12} {number(result.now[kind].get(name)):>12}")
    print(f"\nfirst layer whose output is not finite: {result.first_nonfinite_layer or 'none'}")
    print(result.summary)


def number(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.6g}"


if __name__ == "__main__":
    run_command(command)
