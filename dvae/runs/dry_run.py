"""The output of `dry_run=true`: resolved settings, stages with their states, images, and the launcher's jobs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from dvae.config import stored
from dvae.runs.folder import Run
from dvae.runs.launch_checks import CheckedLaunch
from dvae.runs.stage_states import StageState, saved_steps, stage_state
from dvae.stages.base import Stage, open_stages

SHARD_SIZE = 10_000
"""Number of source images that make one shard of each split: the default of dvae.data.building.shard_build."""


def describe(checked: CheckedLaunch) -> str:
    """Return the text that a dry run prints."""
    config = checked.config
    lines = [stored.to_yaml(checked.kept).rstrip(), "---", *_stage_lines(checked)]
    if counts := checked.images:
        shards = sum(count > 0 for count in counts.values()) * math.ceil(sum(counts.values()) / SHARD_SIZE)
        lines.append(f"images: about {counts['train']} to train on, {counts['heldout']} held out")
        lines.append(f"shards: {shards} in {config.data.shards}")
    lines += filter(None, [checked.launcher.plan(Path(config.run), config.stages)])
    if checked.under_way:
        lines.append(f"run={config.run} is running or queued already: the command would wait for it")
    lines.append("dry run: nothing was written")
    return "\n".join(lines)


def _stage_lines(checked: CheckedLaunch) -> Iterator[str]:
    """Yield one line with all stages, then one line for each stage."""
    run, stages = Run(Path(checked.config.run)), open_stages(checked.config)
    yield f"stages: {' -> '.join(stage.name for stage in stages)}"
    for stage in stages:
        told = [stage.describe(checked.models), _told_state(run, stage)]
        yield f"{stage.name}: {'; '.join(filter(None, told))}"


def _told_state(run: Run, stage: Stage) -> str:
    state = stage_state(run, stage)
    if state is StageState.begun:
        steps = ", ".join(f"{name} at step {step}" for name, step in saved_steps(run, stage).items())
        return f"begun, resumes from the checkpoint of {steps}"
    if state is StageState.stale:
        return "stale, because its settings have changed: it runs again"
    return state.value
