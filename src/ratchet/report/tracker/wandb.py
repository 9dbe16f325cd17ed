"""Weights & Biases: one run there for each lineage here, all of them in one group.

Its own rule does what the session mark does for TensorBoard: a step that a run already has is not taken again. So the
rows that a crash makes again change nothing, as they are the same rows; a rollback is another lineage, and so another
curve. A step is sent when the trainer's row is there, with the orchestrator's of the same step; evaluations, which
come later, have an axis of their own.
"""

import importlib
from typing import Any

from ratchet import config_io
from ratchet.attempts import Assignment
from ratchet.metrics import Row


class WandbSink:
    """One run of a project."""

    def __init__(self, run: Assignment, project: str) -> None:
        """Raises: ImportError if the package is missing."""
        wandb: Any = importlib.import_module("wandb")
        directory = run.paths.trackers / "wandb"
        for folder in (directory.parent, directory):
            folder.mkdir(exist_ok=True)
        name = run.paths.root.name
        self._run = wandb.init(
            project=project,
            id=f"{run.run_id}-{run.lineage}",
            name=name if run.lineage == 0 else f"{name} ({run.lineage})",
            group=run.run_id,
            dir=str(directory),
            resume="allow",
            config=config_io.dump(run.config),
        )
        self._run.define_metric("eval/*", step_metric="eval/step")
        self._waiting: dict[int, Row] = {}
        self._evals: list[Row] = []
        self._evaluated = -1

    def begin(self, step: int) -> None:
        self._waiting.clear()

    def write(self, role: str, row: Row) -> None:
        if role == "orchestrator":
            self._waiting[row["step"]] = row
        elif role == "evals":
            if row["step"] > self._evaluated:
                self._evaluated = row["step"]
                self._evals.append({"eval/step": row["step"]} | row)
        else:
            own = {f"trainer/{name}": value for name, value in row.items()}
            other = self._waiting.pop(row["step"], {})
            other = {f"orchestrator/{name}": value for name, value in other.items()}
            self._run.log(own | other | self._take_eval(), step=row["step"])

    def _take_eval(self) -> Row:
        row = self._evals.pop(0) if self._evals else {}
        return {name: value for name, value in row.items() if name.startswith("eval/")}

    def flush(self) -> None:
        """It sends in its own time, and keeps on the disk what it could not send."""

    def close(self) -> None:
        while self._evals:
            self._run.log(self._take_eval())
        self._run.finish()
