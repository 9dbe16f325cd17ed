"""What a step and a sample cost as runs and batches grow: `uv run python benchmarks/growth.py --root /dev/shm`.

The durable code of a run is driven in this process with tiny payloads: journal, batch, row, ledger and trim of the
orchestrator; reading, row, policy, checkpoint, retention and pruning of the trainer. Times are CPU time, system calls
included: what may grow is our own work, not the disk's.

    a step around 100, 1 000 and 10 000    medians, and the last to the first: goal that of the control,
                                           which says how the machine's own speed changed
    `ckpt ls` after 100 steps and at the end
    a step of a run that keeps many checkpoints
    a sample of a batch of 256 to 65 536   publishing and reading it, and the largest to the smallest: goal 1.0
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ratchet import attempts, batchlog, checkpoint, durable, journal, ledger, metrics, weights
from ratchet.config import CkptConfig, RLConfig
from ratchet.journal import Entry, Journal
from ratchet.launch.opening import Attempt, open_attempt
from ratchet.orchestrator.batches import credited, exact_row
from ratchet.orchestrator.scheduler import Batch, EnvShare, Group, Rules, Scheduler
from ratchet.records import Manifest, Progress, Sample, VersionSpan
from ratchet.stage import Stage
from ratchet.timeline import Timeline

MODEL = Path("examples/reverse_text/model")
GROUPS, SIZE, TOKENS, PROMPT = 4, 4, 12, 4
SAVE_EVERY = 10
ALL = "the whole step"
CONTROL = "the same sum, as a control"
LONG_TOKENS = 32
BATCHES = (256, 1024, 4096, 16384, 65536)
KEPT = (10, 100, 1000)
Costs = dict[str, dict[int, float]]


def sample(draw: int, rollout: int, policy: int, tokens: int = TOKENS) -> Sample:
    return Sample(
        env="reverse_text",
        task=f"train/{draw % 100}",
        draw=draw,
        rollout=rollout,
        token_ids=list(range(8, 8 + tokens)),
        mask=[index >= PROMPT for index in range(tokens)],
        logprobs=[0.0 if index < PROMPT else -0.1234567 - index / 7 for index in range(tokens)],
        versions=[VersionSpan(policy, PROMPT, tokens)],
        reward=rollout / 7,
        advantage=0.0,
        finish_reason="stop",
        metrics={"refused": 0.0, "answered_reward": rollout / 7},
    )


def timed_median(command: list[str], repeats: int = 3) -> float:
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


class Life:
    """A run of both programs in one process; `costs` are CPU seconds by part and step."""

    def __init__(self, root: Path, steps: int, ckpt: CkptConfig) -> None:
        env = {"id": "reverse_text", "args": {"data": "examples/reverse_text/train.jsonl"}}
        orchestrator = {"env": [env], "batch_size": GROUPS * SIZE, "group_size": SIZE}
        config = RLConfig.model_validate(
            {
                "model": {"name": str(MODEL)},
                "output_dir": str(root),
                "max_steps": steps,
                "ckpt": ckpt.model_dump(),
                "orchestrator": orchestrator,
            }
        )
        opened = open_attempt("rl", config, lambda seen: None)
        assert isinstance(opened, Attempt)
        self.opened, self.paths, self._ckpt = opened, opened.paths, ckpt
        self._steps = steps
        self._stages = {
            role: Stage.open(self.paths, attempts.token(1, role, 1)) for role in ("orchestrator", "trainer")
        }
        rules = Rules(
            seed=0, groups_per_batch=GROUPS, max_steps=steps, max_async_level=1, max_off_policy_steps=8
        )
        self._scheduler = Scheduler(rules, [EnvShare("reverse_text", 1.0, 1000)])
        self._journal = Journal(self._stages["orchestrator"])
        self._config_json = (MODEL / "config.json").read_bytes()
        self.costs: Costs = defaultdict(dict)
        self._publish_policy(0)

    @contextmanager
    def _part(self, name: str, step: int) -> Iterator[None]:
        started = time.process_time()
        yield
        self.costs[name][step] = time.process_time() - started

    def run(self, first: int, end: int) -> None:
        for step in range(first, end):
            with self._part(CONTROL, step):
                sum(range(20_000))
            with self._part(ALL, step):
                self._orchestrate(step)
                self._train(step)

    def _orchestrate(self, step: int) -> None:
        with self._part("scheduler", step):
            while (draw := self._scheduler.start(step)) is not None:
                group = [sample(draw.draw, rollout, step) for rollout in range(SIZE)]
                for one in group:
                    entry = Entry(
                        env=one.env, draw=one.draw, rollout=one.rollout, key="k", policy="p", sample=one
                    )
                    self._journal.append(entry)
                self._scheduler.finish(draw.draw, group, {})
            batch = self._scheduler.take_batch()
            assert batch is not None
            state, unsettled = self._scheduler.state(), self._scheduler.unsettled()
            samples = credited(batch.groups, divide_by_std=False)
            row = exact_row(batch, samples, self._scheduler.progress)
        stage = self._stages["orchestrator"]
        with self._part("journal: write, sync, trim", step):
            self._journal.write()
            self._journal.sync()
            self._journal.trim(self._journal.release(unsettled))
        with self._part("batch: publish", step):
            manifest = publish(stage, step, samples, state, row)
        with self._part("metrics: append", step):
            metrics.append(stage, self.paths.metric("orchestrator"), row, flush=True)
        with self._part("ledger: append", step):
            ledger.append(stage, ledger.line(manifest, samples, state))
        Timeline(stage).add("batch", step + 1, 0.0)

    def _train(self, step: int) -> None:
        stage = self._stages["trainer"]
        with self._part("batch: read", step):
            assert batchlog.is_ready(self.paths, step)
            samples, _ = batchlog.read(self.paths, step)
        row = {"step": step + 1, "loss/mean": 0.1234567, "progress/total_samples": len(samples) * (step + 1)}
        metrics.append(stage, self.paths.metric("trainer"), row)
        Timeline(stage).add("train", step + 1, 0.0)
        with self._part("policy: publish, look for", step):
            self._publish_policy(step + 1)
            assert weights.Places(self.paths).newest(above=step) == step + 1
        with self._part("prune", step):
            self._prune(step + 1)
        if self._ckpt.is_due(step + 1, self._steps):
            with self._part("a save: commit", step):
                self.save(step + 1)
            with self._part("a save: retain, prune", step):
                checkpoint.retain(stage, self._ckpt)
                self._prune(step + 1)

    def _publish_policy(self, step: int) -> None:
        stage = self._stages["trainer"]
        directory = stage.begin(f"weights_{step}")
        (directory / "config.json").write_bytes(self._config_json)
        weights.commit(stage, directory, step=step, attempt=1)

    def save(self, step: int) -> None:
        stage = self._stages["trainer"]
        directory = checkpoint.begin(stage, step)
        (directory / checkpoint.TRAINER / "progress.json").write_bytes(
            msgspec.json.encode(Progress(step=step))
        )
        rows = self.paths.metric("trainer")
        durable.fsync_path(rows)
        meta = {"metrics": metrics.mark(rows), "schema": {}}
        entries = durable.seal(directory) + checkpoint.copy_orchestrator_state(stage, directory, step)
        versions = attempts.environment()
        checkpoint.commit(
            stage,
            directory,
            step=step,
            attempt=1,
            world_size=1,
            entries=entries,
            meta=meta,
            versions=versions,
        )

    def _prune(self, step: int) -> None:
        oldest = batchlog.oldest_served(self.paths, step - 1)
        checkpoint.prune(
            self._stages["trainer"], self._ckpt, published=step, oldest_served=oldest, async_level=1
        )


def publish(stage: Stage, step: int, samples: list[Sample], state: bytes, row: metrics.Row) -> Manifest:
    return batchlog.publish(
        stage, step=step, attempt=1, samples=samples, state=state, metrics=row, oldest_served=max(0, step - 1)
    )


def say(what: str, *figures: str) -> None:
    sys.stdout.write(f"{what:36}" + "".join(f"{figure:>14}" for figure in figures) + "\n")
    sys.stdout.flush()


def window(costs: dict[int, float], around: int) -> float:
    """The median over the 100 steps up to there, in milliseconds."""
    return 1e3 * statistics.median(cost for step, cost in costs.items() if around - 100 <= step < around)


def measure_steps(root: Path, steps: int) -> None:
    life = Life(root, steps, CkptConfig(interval=SAVE_EVERY, keep_last=2))
    ls = [str(Path(sys.executable).parent / "ckpt"), "ls", str(root)]
    life.run(0, 110)
    ls_s = [timed_median(ls)]
    life.run(110, steps)
    ls_s.append(timed_median(ls))
    ends = [110, *(end for end in (1_000, 10_000) if end < steps), steps]
    say("CPU ms, by the 100 steps up to", *(str(end) for end in sorted(set(ends))), "last / first")
    for name, costs in sorted(life.costs.items()):
        found = [window(costs, end) for end in sorted(set(ends))]
        say(name, *(f"{cost:.3f}" for cost in found), f"{found[-1] / found[0]:.2f}x")
    say("ckpt ls, s", f"{ls_s[0]:.2f}", f"{ls_s[1]:.2f}", f"{ls_s[1] / ls_s[0]:.2f}x")
    life.opened.close(0, "benchmark")


def measure_kept(root: Path) -> None:
    """What pruning after every policy costs where all checkpoints stay, for each number of them."""
    life = Life(root, max(KEPT), CkptConfig(interval=1))
    done, medians = 0, []
    for count in KEPT:
        life.run(done, count)
        done = count
        costs = [life.costs["prune"][step] for step in range(count - 10, count)]
        medians.append(1e3 * statistics.median(costs))
    say("CPU ms, with so many checkpoints kept", *(str(count) for count in KEPT), "last / first")
    say("prune", *(f"{cost:.3f}" for cost in medians), f"{medians[-1] / medians[0]:.2f}x")
    life.opened.close(0, "benchmark")


def measure_batches(root: Path) -> None:
    say("CPU us a sample, in a batch of", *(str(size) for size in BATCHES), "last / first")
    found: dict[str, list[float]] = defaultdict(list)
    for size in BATCHES:
        for name, cost in batch_costs(root / str(size), size).items():
            found[name].append(1e6 * cost / size)
    for name, costs in found.items():
        say(name, *(f"{cost:.2f}" for cost in costs), f"{costs[-1] / costs[0]:.2f}x")


def batch_costs(root: Path, size: int) -> dict[str, float]:
    """CPU seconds for each part of one batch: medians of so many repeats that small ones are not noise."""
    life = Life(root, 1000, CkptConfig())
    stage = Stage.open(life.paths, "001.orchestrator.2")
    groups = [
        Group(draw, [sample(draw, rollout, 0, LONG_TOKENS) for rollout in range(16)])
        for draw in range(size // 16)
    ]
    state = Scheduler(
        Rules(seed=0, groups_per_batch=1, max_steps=1, max_async_level=1, max_off_policy_steps=1), []
    )
    found: dict[str, list[float]] = defaultdict(list)
    for step in range(max(3, min(20, 16384 // size))):
        at = [time.process_time()]
        samples = credited(groups, divide_by_std=False)
        at.append(time.process_time())
        row = exact_row(Batch(step, groups, {}), samples, Progress())
        at.append(time.process_time())
        manifest = publish(stage, step, samples, state.state(), row)
        at.append(time.process_time())
        ledger.append(stage, ledger.line(manifest, samples, state.state()))
        at.append(time.process_time())
        batchlog.read(life.paths, step)
        at.append(time.process_time())
        data = b"".join(journal.frame(msgspec.msgpack.encode(one)) for one in samples)
        at.append(time.process_time())
        assert data
        stage.remove(life.paths.batch(step))
        names = ("credit", "row", "publish", "ledger: append", "read back", "journal: frames")
        for index, name in enumerate(names):
            found[name].append(at[index + 1] - at[index])
    life.opened.close(0, "benchmark")
    return {name: statistics.median(costs) for name, costs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--root", type=Path, help="a directory to write into (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.root) as name:
        measure_steps(Path(name) / "steps", arguments.steps)
        measure_kept(Path(name) / "kept")
        measure_batches(Path(name))


if __name__ == "__main__":
    main()
