"""What averages of the weights cost: python tests/benchmarks/ema.py (one thread, a minute)

For the demo's refiner and a larger one, in turns in one process: updating one average of all weights by foreach, as
AdamWEma does, on the network's tensors (ZeRO 0) and on one flat tensor (ZeRO 1 to 3), against Python loops over the
tensors; and AdamWEma's whole step with one and with three averages against AdamW's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from dvae.config import compose
from dvae.config.schema import EmaConfig
from dvae.models import components
from dvae.training.engine.ema import AdamWEma, ema_decays

NETWORKS = {
    "demo's refiner": ["recipe=demo"],
    "refiner of cifar10": ["recipe=cifar10", "source.path=none"],
}
TURNS, WARM_UP = 30, 3
BETAS = (0.9, 0.999)
WEIGHT = 1e-3


def in_turns(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, of this thread alone, whatever else the machine does."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(WARM_UP + TURNS):
        for name, work in works.items():
            began = time.thread_time()
            work()
            if turn >= WARM_UP:
                times[name].append(time.thread_time() - began)
    return {name: statistics.median(seen) for name, seen in times.items()}


def copies(weights: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(weight.clone()) for weight in weights]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def step_with(weights: list[torch.Tensor], ema: EmaConfig) -> Callable[[], object]:
    optimizer = AdamWEma(copies(weights), lr=1e-4, betas=BETAS, weight_decay=0.0)
    optimizer.param_groups[0]["ema_decays"] = ema_decays(ema, 1000)
    return optimizer.step


@torch.no_grad()
def average_costs(weights: list[torch.Tensor]) -> dict[str, float]:
    flat = torch.cat([weight.flatten() for weight in weights])

    def classic(averages: list[torch.Tensor]) -> None:
        for average, weight in zip(averages, weights, strict=True):
            average.mul_(1.0 - WEIGHT).add_(weight, alpha=WEIGHT)

    def loop(averages: list[torch.Tensor]) -> None:
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, WEIGHT)

    kept = [[weight.clone() for weight in weights] for _ in range(3)]
    whole = [flat.clone()]
    return in_turns(
        {
            "foreach": lambda: torch._foreach_lerp_(kept[0], weights, WEIGHT),
            "foreach, one flat tensor": lambda: torch._foreach_lerp_(whole, [flat], WEIGHT),
            "loop of lerp_": lambda: loop(kept[1]),
            "loop of mul_ and add_": lambda: classic(kept[2]),
        }
    )


def step_costs(weights: list[torch.Tensor]) -> dict[str, float]:
    plain = torch.optim.AdamW(copies(weights), lr=1e-4, betas=BETAS, weight_decay=0.0, fused=True)
    return in_turns(
        {
            "AdamW": plain.step,
            "AdamWEma, one average": step_with(weights, EmaConfig()),
            "AdamWEma, three averages": step_with(weights, EmaConfig(extra_widths=[0.05, 0.1])),
        }
    )


def main() -> None:
    torch.set_num_threads(1)
    for title, words in NETWORKS.items():
        settings = compose.to_run_config(compose.compose("train", words))
        weights = [parameter.detach() for parameter in components.build_models(settings).denoiser.parameters()]
        count = sum(weight.numel() for weight in weights)
        print(f"{title}: {count / 1e6:.1f}M parameters in {len(weights)} tensors")
        for costs in (average_costs(weights), step_costs(weights)):
            unit = next(iter(costs.values()))
            for name, seconds in costs.items():
                print(f"  {name:<26}{1000 * seconds:9.2f} ms  {seconds / unit:5.2f} of {next(iter(costs))}")


if __name__ == "__main__":
    main()
