"""Train one task in a run folder, with checkpoints, metrics, averaged weights (EMA), bundle and record."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dvae.config.schema import RunConfig
from dvae.errors import UserError
from dvae.runs.folder import Run
from dvae.stages.run_models import export_bundle
from dvae.tracking.tracker import NoTracker, Tracker
from dvae.training.batches import open_loader
from dvae.training.loop import TrainHooks, train
from dvae.training.resilience import ranks
from dvae.training.resilience.checkpoint import Checkpoints
from dvae.training.train_task import TrainTask
from dvae.utils.weights import StateDict, part_of


def train_stage(
    run: Run,
    config: RunConfig,
    task: TrainTask,
    parts: Mapping[str, str],
    hooks: TrainHooks,
    final_metrics: Callable[[StateDict], dict[str, float]] | None = None,
) -> None:
    """Train one task, save its averaged weights, update the bundle, and record the training as finished.

    Every rank must call this.

    Args:
        run: The run.
        config: Settings of the run.
        task: The task to train.
        parts: Part to save -> its submodule in the task's module ("": the whole module).
        hooks: Functions that draw previews and compute scores during training.
        final_metrics: final_metrics(averaged weights) returns metrics for the record. It is called on rank 0 only.
    """
    check_task(task, parts)
    training = task.config
    # Count now: ZeRO stage 3 will partition the parameters.
    parameters = sum(p.numel() for p in task.modules()[task.name].parameters())
    checkpoints = Checkpoints(run.checkpoints(task.name), training.keep, training.keep_every)
    tracked = NoTracker() if ranks.rank() else Tracker(run.path, config.tracking.wandb, task.name)
    with tracked as tracker, open_loader(config, training, task.name, images=task.needs_images) as data:
        averaged, state = train(task, data, checkpoints, tracker, hooks, run.path)
    weights = averaged[task.name]

    def finish() -> None:
        for part, submodule in parts.items():
            run.save_weights(part, part_of(weights, submodule) if submodule else weights)
        export_bundle(run, config)
        record = {
            "seconds": state.seconds,
            "steps": state.step,
            "images_per_second": training.batch * state.step / state.seconds,
            "parameters": parameters,
        }
        run.finish(task.name, record | (final_metrics(weights) if final_metrics else {}))

    ranks.on_rank_zero(finish)


def check_task(task: TrainTask, parts: Mapping[str, str]) -> None:
    """Raise UserError if a task has no module of its own name, or the module has not the submodules to save."""
    modules = task.modules()
    name = getattr(task, "name", None)
    if name not in modules:
        raise UserError(f"task {type(task).__name__}: name={name!r} is no key of modules(), which has {list(modules)}")
    names = {submodule for submodule, _ in modules[name].named_modules()}
    if lost := [submodule for submodule in parts.values() if submodule not in names]:
        raise UserError(f"task {type(task).__name__}: the module {name!r} has no submodule {lost[0]!r} to save")
