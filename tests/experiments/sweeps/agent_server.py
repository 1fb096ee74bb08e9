"""What W&B's server does for a sweep agent: it hands out trials, one after the other, that W&B's own engine draws."""

from __future__ import annotations

import json
from typing import Any

import sweeps
import yaml
from tracking.wandb_server import Server


class AgentServer(Server):
    """A sweep of `n` trials for one agent. By run id: parameters, and W&B's summary."""

    def __init__(self, sweep: dict[str, Any], count: int) -> None:
        super().__init__()
        self.sweep, self.count = sweep, count
        self.trials: dict[str, dict[str, Any]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.opened: dict[str, list[str]] = {}

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        if operation == "SweepWithRuns":
            found = {"id": "s", "name": "sweep", "state": "RUNNING", "config": yaml.safe_dump(self.sweep)}
            return {"project": {"sweep": found | {"method": self.sweep["method"], "runs": {"edges": []}}}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent"}}}
        if operation == "Heartbeat":
            commands = [] if json.loads(given["runState"]) else [self.next()]
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        return super().answer(operation, given)

    def next(self) -> dict[str, Any]:
        """The command for an agent that runs nothing; the run before it has ended, and is put aside."""
        if self.trials:
            last = list(self.trials)[-1]
            self.summaries[last], self.opened[last] = json.loads(self.summary), sorted(self.names)
        self.history, self.summary, self.names = [], "{}", set()
        if len(self.trials) == self.count:
            return {"type": "exit"}
        metric = self.sweep["metric"]["name"]
        runs = [
            sweeps.SweepRun(
                name=name, state="finished", config=config, summary_metrics={metric: self.summaries[name][metric]}
            )
            for name, config in self.trials.items()
        ]
        run_id = f"trial{len(self.trials) + 1}"
        self.trials[run_id] = sweeps.next_run(self.sweep, runs).config
        return {"type": "run", "run_id": run_id, "program": self.sweep["program"], "args": self.trials[run_id]}
