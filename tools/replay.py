"""Replay a step that was not finite: python tools/replay.py bundle=runs/x/nonfinite-refiner-00000012"""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from dvae.errors import UserError, run_command

USAGE = """usage: python tools/replay.py bundle=RUN/nonfinite-STAGE-STEP [shards=PLACE] [plugins=[MODULE]]

Takes a training step that was left out because a gradient was not finite once more, up to its gradients, in one
process: with the weights that the bundle holds, and the same samples and draws. Prints loss and other figures (by tenth
of t, where there are times) and gradient norms by layer, as they were recorded and as they are now; the first layer
that makes a value that is not finite; and whether the step is reproduced. Nothing is changed in the run folder."""


def command(argv: list[str]) -> None:
    """Compose the words, replay, and print what was found."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return
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
