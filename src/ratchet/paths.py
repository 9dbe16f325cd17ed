"""Where each thing of a run lives. The directory is an interface: docs/run-directory.md."""

import re
from dataclasses import dataclass
from pathlib import Path

_STEP = re.compile(r"step_(\d+)")

DEVICE = "device.json"
INPUTS = "inputs.json"


def step_name(step: int) -> str:
    return f"step_{step}"


def parse_step(name: str) -> int | None:
    """The step that a directory name states, or None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class RunPaths:
    """One run's directory, by name. Holds no handles: every use opens by path."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def run_file(self) -> Path:
        return self.root / "run.toml"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def batches(self) -> Path:
        return self.root / "batches"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def evals(self) -> Path:
        return self.root / "evals"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def timelines(self) -> Path:
        return self.root / "timeline"

    @property
    def trackers(self) -> Path:
        return self.root / "trackers"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger" / "ledger.jsonl"

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    @property
    def superseded(self) -> Path:
        return self.root / "superseded"

    def attempt(self, number: int) -> Path:
        return self.attempts / f"{number:03d}"

    def device(self, number: int, name: str) -> Path:
        """What a program computes on in an attempt."""
        return self.attempt(number) / name / DEVICE

    def batch(self, step: int) -> Path:
        return self.batches / step_name(step)

    def weight(self, step: int) -> Path:
        return self.weights / step_name(step)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    def eval(self, step: int) -> Path:
        return self.evals / step_name(step)

    def timeline(self, role: str) -> Path:
        return self.timelines / f"{role}.jsonl"

    def metric(self, role: str) -> Path:
        return self.metrics / f"{role}.jsonl"
