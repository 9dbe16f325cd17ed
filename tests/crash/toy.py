"""A run without torch: the real launcher, log, checkpoints, resume and retention around a model of one integer.

    python toy.py RUN_DIR MAX_STEPS [flags of the real command line]

The "policy" is a hash chained over the batches, so a skipped, doubled or reordered batch changes every later state.
"""

import shutil
import sys
from pathlib import Path

import msgspec

from ratchet import batchlog, checkpoint, durable, ledger, memory, metrics, process, weights
from ratchet.attempts import Plan
from ratchet.config import RLConfig
from ratchet.config_io import load
from ratchet.journal import Entry, Journal, RolloutId
from ratchet.launch.opening import open_attempt
from ratchet.memory import MemoryStage
from ratchet.records import Manifest, Sample

AHEAD = 4
EVAL_EVERY = 4
EVER = 1 << 40


def sample(draw):
    return Sample(
        env="toy",
        task=str(draw),
        draw=draw,
        rollout=0,
        token_ids=[draw],
        mask=[True],
        logprobs=[0.0],
        versions=[],
        reward=1.0,
        advantage=0.0,
        finish_reason="stop",
    )


class Rollouts:
    """The orchestrator's rollouts, finished ahead of the batches that they go into, and kept in the journal.

    Each generation leaves a line in <run>.generated, beside the run: a test counts them.
    """

    def __init__(self, stage, record):
        root = stage.paths.root
        self.generated = root.with_name(f"{root.name}.generated")
        self.key = f"{record.run_id}/{record.lineage}"
        self.journal = Journal(stage, segment_bytes=400)
        self.journal.restore(range(EVER))
        self.ready = {}

    def take(self, draw):
        for ahead in range(draw, draw + AHEAD):
            if ahead not in self.ready:
                self.ready[ahead] = self.play(ahead)
        return self.ready.pop(draw)

    def play(self, draw):
        entry = self.journal.find(RolloutId("toy", draw, 0))
        if entry is not None:
            assert entry.key == self.key, f"the journal holds draw {draw} of another lineage"
            return entry.outcome
        with self.generated.open("a") as file:
            file.write(f"{draw}\n")
        found = sample(draw)
        self.journal.append(Entry(env="toy", draw=draw, rollout=0, key=self.key, policy="", sample=found))
        self.journal.write()
        self.journal.sync()
        return found

    def settle(self, next_draw):
        self.journal.trim(self.journal.release(range(next_draw, EVER)))


class Policies:
    """The trainer's way to weights/, or with `weights.transport = "memory"` its two."""

    def __init__(self, stage, config, record):
        self.stage, self.config, self.record = stage, config, record
        paths = memory.find(config, record.run_id, record.attempt)
        self.memory = None if paths is None else MemoryStage.join(paths, stage)
        self.places = weights.Places(stage.paths, paths)

    def publish(self, step, state):
        stage = self.memory or self.stage
        directory = stage.begin(f"weights_{step}")
        (directory / "model.safetensors").write_text(state)
        weights.commit(stage, directory, step=step, attempt=self.record.attempt)
        outlives = step == self.record.plan.step or memory.outlives(self.config, step)
        if self.memory is not None and outlives:
            self.copy(step)

    def copy(self, step):
        source, directory = self.memory.paths.weight(step), self.stage.begin(f"weights_{step}")
        durable.copy_file(source / "model.safetensors", directory / "model.safetensors")
        weights.commit(self.stage, directory, step=step, attempt=self.record.attempt)

    def prune(self, step):
        if self.memory is not None:
            for old in durable.steps(self.memory.paths.weights):
                if old < step - 1 and (place := self.memory.withdraw(self.memory.paths.weight(old))):
                    shutil.rmtree(place)
        checkpoint.prune(self.stage, self.config.ckpt, published=step, oldest_served=step - 1, async_level=0)

    def read(self, step):
        name = str(self.places.read_policy(step, run_id=self.record.run_id, lineage=0))
        (place, *_) = self.places.directories(weights.Policy.parse(name))
        durable.verify(place)
        return (place / "model.safetensors").read_text()


def save(stage, step, state, config, attempt, policies):
    if checkpoint.is_committed(stage.paths, step):
        return
    directory = checkpoint.begin(stage, step)
    with durable.SealedFile(directory / "trainer" / "state") as shard:
        shard.write(state.encode())
    entries = [shard.entry("trainer/state")]
    entries += checkpoint.copy_orchestrator_state(stage, directory, step)
    durable.fsync_path(stage.paths.metric("trainer"))
    meta = {"metrics": metrics.mark(stage.paths.metric("trainer"))}
    checkpoint.commit(
        stage, directory, step=step, attempt=attempt, world_size=1, entries=entries, meta=meta, versions={}
    )
    retain(stage, step, config, policies)


def retain(stage, step, config, policies):
    if config.ckpt is not None:
        checkpoint.retain(stage, config.ckpt)
    policies.prune(step)


def restore(paths, plan):
    if not plan.from_checkpoint:
        return "start"
    durable.verify(paths.checkpoint(plan.step))
    return (paths.checkpoint(plan.step) / "trainer" / "state").read_text()


def emit(stage, paths, step, attempt, rollouts):
    """The orchestrator's part: the state counts draws, and rides in the batch."""
    if batchlog.is_ready(paths, step):
        return
    before = batchlog.read_state(paths.batch(step - 1)) if paths.batch(step - 1).exists() else None
    if before is None and step > 0:
        before = (paths.checkpoint(step) / checkpoint.STATE).read_bytes()
    drawn = msgspec.json.decode(before)["drawn"] if before else 0
    row = {"step": step + 1, "reward/mean": float(drawn)}
    drawn += 1
    totals = {"step": step + 1, "total_samples": drawn, "total_tokens": drawn, "total_problems": drawn}
    envs = [{"label": "toy", "drawn": drawn}]
    state = msgspec.json.encode({"drawn": drawn, "next_draw": drawn, "progress": totals, "envs": envs})
    samples = [rollouts.take(drawn - 1)]
    manifest = batchlog.publish(
        stage,
        step=step,
        attempt=attempt,
        samples=samples,
        state=state,
        metrics=row,
        oldest_served=step,
    )
    durable.crash_point("toy.before_row")
    metrics.append(stage, paths.metric("orchestrator"), row, flush=True)
    durable.crash_point("toy.before_line")
    ledger.append(stage, ledger.line(manifest, samples, state))
    rollouts.settle(drawn)


def evaluate(stage, step, attempt, max_steps, policies):
    """The orchestrator's part as well: policy `step` is evaluated once, where that is due, and its row appended."""
    is_due = step % EVAL_EVERY == 0 or step == max_steps
    if not is_due or durable.read_committed(stage.paths.eval(step)) is not None:
        return
    policy = policies.read(step)
    row = {"step": step, "eval/toy/reward": policy}
    directory = stage.begin(f"eval_{step}")
    (directory / "toy.json").write_bytes(msgspec.json.encode([{"task": "eval/0", "completion": policy}]))
    (directory / "metrics.json").write_bytes(msgspec.json.encode(row))
    manifest = Manifest(kind="eval", step=step, attempt=attempt, files=tuple(durable.seal(directory)))
    stage.commit(directory, stage.paths.eval(step), manifest)
    durable.crash_point("toy.before_eval_row")
    metrics.append(stage, stage.paths.metric("evals"), row, flush=True)


def main():
    root, steps, *flags = sys.argv[1:]
    arguments = ["--model.name", "toy", "--output-dir", root, "--max-steps", steps, *flags]
    config = load(RLConfig, arguments)
    opened = open_attempt("rl", config, lambda seen: None)
    if isinstance(opened, Plan):
        return 0
    paths, stage, plan = opened.paths, opened.stage, opened.record.plan
    for message in plan.messages:
        sys.stdout.write(message + "\n")
    attempt, state, step = opened.record.attempt, restore(paths, plan), plan.step
    policies = Policies(stage, config, opened.record)
    policies.publish(step, state)
    rollouts = Rollouts(stage, opened.record)
    while step < config.max_steps:
        evaluate(stage, step, attempt, config.max_steps, policies)
        # One batch ahead of training, as the asynchronous orchestrator is.
        emit(stage, paths, step, attempt, rollouts)
        if step + 1 < config.max_steps:
            emit(stage, paths, step + 1, attempt, rollouts)
        samples, _ = batchlog.read(paths, step)
        state = durable.hash_bytes(f"{state}/{samples[0].draw}".encode())
        step += 1
        metrics.append(stage, paths.metric("trainer"), {"step": step, "loss": int(state[:6], 16)})
        policies.publish(step, state)
        policies.prune(step)
        if config.ckpt is not None and config.ckpt.is_due(step, config.max_steps):
            save(stage, step, state, config, attempt, policies)
    evaluate(stage, step, attempt, config.max_steps, policies)
    retain(stage, step, config, policies)
    opened.close(0, "complete")
    return 0


if __name__ == "__main__":
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    process.run(main)
