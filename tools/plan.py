"""What a recipe would take: python tools/plan.py recipe=celebahq256 nodes=8 gpus_per_node=8 gpu=h100"""

from __future__ import annotations

from dvae.errors import run_command

USAGE = """usage: python tools/plan.py recipe=NAME [nodes=1] [gpus_per_node=8] [gpu=h100] [efficiency=0.1] [reserve=0.1]
       [overlap=BOOL] [network=GB/S] [packing=0.6] [out=FILE.json] [key=value ...]

Predicts, for each training stage of the recipe, without training anything: bytes on each GPU at every ZeRO stage,
activations with and without checkpointing, the largest micro-batch that fits, the time of a step, what is communicated
and read, and GPU-days to the recipe's end. Sizes and operations are counted on tensors without values; times are these
over the GPU's data sheet times `efficiency`, which is an assumption. It prints all its assumptions: docs/scale.md.
Every word of tools/launch.py works: refiner=dit_xl train_refiner.batch=256 train_refiner.precision=bf16 ...

  gpu=NAME               {gpus}
  overlap=true|false     whether communication hides behind computing (by default at ZeRO 3 alone)
  network=GB/S           between machines, for each GPU and direction (by default the table's)
  packing=0.6            bytes of a PNG over those of its pixels, where there are no shards yet
  out=FILE.json          the figures, too"""


def command(argv: list[str]) -> None:
    """Compose the recipe as tools/launch.py does, count, and print."""
    from dvae.planning.hardware import GPUS

    if any(word in ("-h", "--help") for word in argv):
        print(USAGE.format(gpus=", ".join(GPUS)))
        return
    from dvae.planning import plan_run

    print(plan_run.run(argv))


if __name__ == "__main__":
    run_command(command)
