"""`trainer --replay RUN`: train a run again from its initial weights and its batches, and compare.

Nothing of the run is written. Compared are every metric row, and every tensor of model and optimizer at each
checkpoint that is still there. The range that can be proven begins at step 0, or, where the first batches were
pruned, at the oldest checkpoint whose following batches are all there.
"""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from ratchet import attempts, checkpoint, device_notes, durable, log, metrics, process
from ratchet.attempts import Assignment, Plan
from ratchet.config import RLConfig, SFTConfig
from ratchet.errors import EXIT_CRASH, EXIT_OK, Refusal
from ratchet.inputs import files, history, seen
from ratchet.inputs.tree import CONFIG, WEIGHTS, Tree, reconcile, short, value_of
from ratchet.models.device import choose
from ratchet.models.trainable import build_trainable
from ratchet.paths import RunPaths
from ratchet.records import Progress
from ratchet.stage import Stage
from ratchet.timeline import Timeline
from ratchet.trainer import rows, schedule
from ratchet.trainer.loop import inputs_of, open_source
from ratchet.trainer.state import Checkpointer, TrainerState
from ratchet.trainer.update import open_updater
from ratchet.trainer.world import World, open_world, set_determinism

_ROWS = ("data", "tokenizer", "template")


@dataclass(frozen=True)
class Finding:
    """One comparison: what was compared, and what differs; nothing if it is equal."""

    what: str
    different: str = ""


def _decisive(config: SFTConfig | RLConfig) -> tuple[Any, ...]:
    """Every setting that decides what an update makes of the state before it, and of the batches."""
    data = config.data if isinstance(config, SFTConfig) else None
    return config.seed, config.model, config.trainer, config.max_steps, data


def provable_start(paths: RunPaths, last: int) -> int:
    """The oldest state from which every batch up to `last` is there. Raises: Refusal if there is none."""
    batches = set(durable.committed(paths.batches))
    for start in [0, *durable.committed(paths.checkpoints)]:
        if start < last and set(range(start, last)) <= batches:
            return start
    raise Refusal(
        f"{paths.root} cannot be replayed: no checkpoint is followed by all of its batches. "
        "Runs with checkpoints and without --ckpt.keep-last keep them."
    )


class Replay:
    """One pass over the batches of a run."""

    def __init__(self, root: Path, world: World) -> None:
        self._paths = RunPaths(root)
        self._world = world
        self._history = [attempts.read(self._paths, number) for number in attempts.numbers(self._paths)]
        self._rows = {row["step"]: row for row in metrics.read(self._paths.metric("trainer"))}
        self.last = max(self._rows, default=0)
        self._inputs = seen.known(self._paths, self._history[-1])
        self.verified: dict[str, str] = {}
        """The inputs that were read again and are those of the run, by group."""
        is_rl = isinstance(self._config_of(0), RLConfig)
        self.start = provable_start(self._paths, self.last) if is_rl else self._first_of_these_rows()
        self._open(self._config_of(self.start))
        if self.start:
            self._checkpointer(self._config).restore(self._state, self.start)

    def _config_of(self, step: int) -> SFTConfig | RLConfig:
        """The settings of the newest attempt that began at or before `step`: update `step` was made under them."""
        record = next(r for r in reversed(self._history) if r.plan.step <= step)
        config = attempts.read_config(self._paths, record)
        newest = attempts.read_config(self._paths, self._history[-1])
        for section in ("model", "data"):  # known by content: where it lies now, not where it lay then
            if (there := getattr(newest, section, None)) is not None:
                places = {key: getattr(there, key) for key in ("name", "tokenizer") if hasattr(there, key)}
                config = config.model_copy(
                    update={section: getattr(config, section).model_copy(update=places)}
                )
        return config

    def _checkpointer(self, config: SFTConfig | RLConfig) -> Checkpointer:
        newest = self._history[-1]
        run = Assignment(
            paths=self._paths,
            config=config,
            plan=Plan(step=self.start),
            attempt=newest.attempt,
            run_id=newest.run_id,
            lineage=newest.lineage,
            stage=Stage(self._paths, "replay"),
        )
        return Checkpointer(run, self._world, Timeline(None), on_commit=lambda step: None)

    def _open(self, config: SFTConfig | RLConfig) -> None:
        self._config = config
        self._verify(inputs_of(config))
        with files.verified_weights(config.model, self._inputs):
            model, base = build_trainable(config.model, seed=config.seed)
        self.verified |= {n: v for n, v in history.said(self._inputs).items() if n == WEIGHTS}
        self._updater = open_updater(model, config, self._world)
        self._state = TrainerState(model, self._updater.optimizer, Progress(), base)
        self._source = open_source(config, self._paths, lambda: False, is_heard=False)

    def _verify(self, found: Tree) -> None:
        """Raises: InputChanged if what is trained with is not what this run was trained with"""
        used = {CONFIG} if isinstance(self._config, RLConfig) else {CONFIG, *_ROWS}
        found = {name: leaves for name, leaves in found.items() if name in used & {*self._inputs.groups}}
        reconcile(self._inputs, found)
        self.verified |= {name: short(value_of(leaves)) for name, leaves in found.items()}

    def _first_of_these_rows(self) -> int:
        """Demonstrations as they were before an accepted change are gone: it begins at a checkpoint after the last.

        Raises: Refusal if there is none
        """
        changed = max((entry.step for entry in self._inputs.accepted if entry.group in _ROWS), default=0)
        start = next((s for s in durable.committed(self._paths.checkpoints) if s >= changed), None)
        if changed and start is None:
            raise Refusal(
                f"{self._paths.root} cannot be replayed: its data was changed at step {changed}, and no checkpoint "
                "after that is there."
            )
        return start or 0 if changed else 0

    def _follow(self, step: int) -> None:
        """Take over the settings of update `step` where they changed, with the state as it is."""
        config = self._config_of(step)
        if _decisive(config) == _decisive(self._config):
            return
        before, tensors = self._state, self._state.tensors()
        steps = before.optimizer.steps()
        self._open(config)
        self._state.progress = before.progress
        with torch.no_grad():
            for part, own in self._state.tensors().items():
                for name, tensor in own.items():
                    tensor.copy_(tensors[part][name])
        self._state.optimizer.set_steps(steps)

    def run(self) -> Iterator[Finding]:
        """Train from the start to the last row, yielding each comparison as it is made."""
        checkpoints = set(durable.committed(self._paths.checkpoints))
        for step in range(self.start, self.last):
            self._follow(step)
            factor = schedule.factor(self._config.trainer.scheduler, self._config.max_steps, step)
            batch = self._source.read(self._state.progress)
            figures = self._updater.update(batch, step, factor)
            rows.advance(self._state.progress, batch)
            row = rows.exact_row(self._config, self._state.progress, batch, figures, factor)
            yield Finding(f"row {step + 1}", _row_difference(row, metrics.exact(self._rows[step + 1])))
            if step + 1 in checkpoints:
                yield Finding(f"checkpoint {step + 1}", self._state_difference(step + 1))

    def _state_difference(self, step: int) -> str:
        """The first tensor that is not equal bit for bit, with its largest difference."""
        folder = self._paths.checkpoint(step) / checkpoint.TRAINER
        own = self._state.tensors_of(durable.verify(self._paths.checkpoint(step)).meta["schema"])
        live = {part: {name: _whole(t) for name, t in tensors.items()} for part, tensors in own.items()}
        saved = {part: {n: torch.empty_like(t) for n, t in own.items()} for part, own in live.items()}
        load(saved, storage_reader=FileSystemReader(folder))
        for part, own in live.items():
            for name, tensor in own.items():
                if not torch.equal(tensor, saved[part][name]):
                    gap = (tensor - saved[part][name]).abs().max()
                    return f"{part}.{name} differs by up to {float(gap):.3g}"
        return ""


def _whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()


def _row_difference(found: dict[str, Any], recorded: dict[str, Any]) -> str:
    keys = [key for key in {**recorded, **found} if found.get(key) != recorded.get(key)]
    return ", ".join(f"{key} {found.get(key)!r} (recorded {recorded.get(key)!r})" for key in keys[:3])


def _device(paths: RunPaths, wanted: str) -> torch.device:
    """What the trainer computed on last, if it was noted. Raises: Refusal where it is not here"""
    held = device_notes.newest(paths, "trainer", since=0)
    if held is None:
        return choose(wanted)
    if held.type == "cuda" and not torch.cuda.is_available():
        raise Refusal(
            f"The trainer of this run computed on {held}, and torch finds no GPU: a CPU gives other bits, so replay it "
            "where there is one."
        )
    return choose(held.type)


def main() -> int:
    """Exit 0 if everything is equal, 1 with what differs otherwise. Raises: Refusal"""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    root = Path(sys.argv[1])
    log.setup("replay")
    config = attempts.read_config(
        RunPaths(root), attempts.read(RunPaths(root), attempts.numbers(RunPaths(root))[-1])
    )
    set_determinism(config.trainer.threads)
    world = open_world(_device(RunPaths(root), config.trainer.device), config.trainer.parallel.replicate)
    replay = Replay(root, world)
    counts = {"row": 0, "checkpoint": 0}
    different = []
    for finding in replay.run():
        counts[finding.what.split()[0]] += 1
        if finding.different:
            different.append(f"{finding.what}: {finding.different}\n")
    if world.is_first:
        sys.stdout.writelines(different)
        sys.stdout.write(
            f"steps {replay.start} to {replay.last} trained again: {counts['row']} rows and {counts['checkpoint']} "
            f"checkpoints compared, {len(different)} different\n"
        )
        read = ", ".join(f"{name} {value}" for name, value in sorted(replay.verified.items()))
        sys.stdout.write(f"inputs verified: {read or 'none, this run has no names of them'}\n")
    world.part()
    return EXIT_CRASH if different else EXIT_OK


if __name__ == "__main__":
    process.die_with_parent()
    process.run(main)
