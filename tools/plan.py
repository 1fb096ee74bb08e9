"""Predict what a recipe takes: python tools/plan.py recipe=celebahq256 nodes=8 gpus_per_node=8 gpu=h100"""

from __future__ import annotations

from dvae.config.command_line import Command
from dvae.errors import run_command
from dvae.planning.hardware import GPUS

ABOUT = Command(
    name="plan",
    text=f"""Predict memory, time and GPU-days of a recipe on GPUs that you do not have here.

  python tools/plan.py recipe=celebahq256 nodes=8 gpus_per_node=8 gpu=h100
  python tools/plan.py recipe=celebahq256 refiner=dit_xl train_refiner.batch=256 train_refiner.precision=bf16
  python tools/plan.py recipe=avatars ~classifier efficiency=0.3 out=plan.json      # the figures as JSON, too

For each training stage the command prints the bytes on each GPU at every ZeRO stage, activations with and without
checkpointing, the largest micro-batch that fits, the time of a step, communication, reading, and GPU-days.

- Nothing is trained. Sizes and operations are counted on tensors without values. Times are these operations over the
  peak of the GPU's data sheet times `efficiency`, which is an assumption. The command prints all its assumptions:
  docs/scale.md.
- gpu= takes one of {", ".join(GPUS)}.
- Every setting of tools/launch.py can be set, too.""",
    settings=("dvae.planning.plan_settings:PlanConfig",),
    bare="recipe",
)


def command(argv: list[str]) -> None:
    """Compose the recipe as tools/launch.py does, count, and print."""
    argv = ABOUT.arguments(argv)
    from dvae.planning import plan_run

    print(plan_run.run(argv))


if __name__ == "__main__":
    run_command(command)
