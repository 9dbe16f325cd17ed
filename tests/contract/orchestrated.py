"""An orchestrator as a real process, and a trainer of one hash in this process: what the contract tests start."""

import asyncio
import os
import sys
from pathlib import Path

import msgspec
from fake_inference import END

from ratchet import attempts, batchlog, digest, durable, memory, metrics, weights
from ratchet.config import RLConfig
from ratchet.launch.opening import open_attempt
from ratchet.memory import MemoryStage
from ratchet.stage import Stage

MODEL = Path(__file__).parents[2] / "examples" / "reverse_text" / "model"
STEPS = 4

MY_ENV = '''
import asyncio
from ratchet.envs.base import Environment, Score, Task
from ratchet.records import RolloutFailure

class Talk(Environment):
    """Two turns, both methods coroutines; some tasks fail in each of the ways that a task can."""
    def __init__(self, failing=""):
        self.failing = failing
    @property
    def size(self):
        return 8
    @property
    def eval_size(self):
        return 2
    async def task(self, index, split):
        return Task(f"{split}-{index}", index)
    def messages(self, task):
        return [{"role": "user", "content": f"task {task.data}"}]
    async def step(self, task, transcript):
        await asyncio.sleep(0)
        if self.failing == "all":
            raise ValueError("always")
        if self.failing == "some" and task.data == 1:
            raise ValueError("task 1")
        if self.failing == "some" and task.data == 2 and len(transcript.completion) % 2:
            return RolloutFailure("odd", "an odd answer")
        if self.failing == "some" and task.data == 3:
            return Score(float("nan"))
        if len(transcript.messages) == 2:
            return [{"role": "user", "content": "again"}]
        return Score(len(transcript.completion) / 8, {"turns": 2.0})
'''


def settings(root, **more):
    orchestrator = {
        "env": [{"id": "reverse_text", "args": {"data": "train.jsonl", "eval_data": "eval.jsonl"}}],
        "batch_size": 12,
        "group_size": 4,
        "sampling": {"max_tokens": 7},
        "client": {"wait_s": 5, "timeout_s": 20, "retries": 8},
        "eval": {"interval": 2, "tasks": 3, "rollouts_per_task": 2},
    }
    orchestrator |= more.pop("orchestrator", {})
    given = {
        "model": {"name": str(MODEL)},
        "output_dir": str(root),
        "max_steps": STEPS,
        "ckpt": {},
        "orchestrator": orchestrator,
    }
    return RLConfig.model_validate(given | more)


class Run:
    """One attempt: its orchestrator process, and a trainer in this process."""

    def __init__(self, config, *urls):
        self.config, self.urls = config, urls
        opened = open_attempt("rl", config, lambda seen: None)
        assert isinstance(opened.record, attempts.Record)
        self.opened, self.paths, self.record = opened, opened.paths, opened.record
        self.incarnation = 0
        self.stage = Stage.open(self.paths, attempts.token(self.record.attempt, "trainer", 1))
        paths = memory.find(config, self.record.run_id, self.record.attempt)
        self.memory = None if paths is None else MemoryStage.join(paths, self.stage)
        self.copy_delay_s = 0.0
        """How long after a policy is in memory it comes onto the disk."""
        self.trainer = None
        self.unpublished = set()
        self.prunes = False
        """Whether the trainer deletes policies below the oldest that a server may hold."""

    async def start(self):
        """Start an orchestrator; one that was killed before is fenced first."""
        if self.incarnation:
            token = attempts.token(self.record.attempt, "orchestrator", self.incarnation)
            self.opened.stage.revoke(token)
        self.incarnation += 1
        Stage.open(self.paths, attempts.token(self.record.attempt, "orchestrator", self.incarnation))
        self.trainer = self.trainer or asyncio.create_task(self.train())
        environment = {k: v for k, v in os.environ.items() if k != "RATCHET_PARENT"}
        command = ["-m", "ratchet.orchestrator", str(self.paths.root), str(self.record.attempt)]
        arguments = [str(self.incarnation), "--base-url", *self.urls]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, *command, *arguments, env=environment, stderr=asyncio.subprocess.PIPE
        )

    async def wait(self):
        """The exit code, and what was said."""
        _, said = await asyncio.wait_for(self.process.communicate(), 40)
        return self.process.returncode, said.decode()

    async def finish(self):
        code, said = await self.wait()
        assert code == 0, said
        await self.trainer
        return said

    async def close(self, code=1):
        self.trainer.cancel()
        await asyncio.gather(self.trainer, return_exceptions=True)
        self.opened.close(code, "test")

    async def train(self):
        """Publish policy v for batch v-1, its content chained over all batches before."""
        step = self.record.plan.step
        state = "start"
        await self.publish(step, state)
        while step < self.config.max_steps:
            while not batchlog.is_ready(self.paths, step):
                await asyncio.sleep(0.005)
            samples, manifest = batchlog.read(self.paths, step)
            state = durable.hash_bytes(state.encode() + msgspec.msgpack.encode(samples))
            step += 1
            await self.publish(step, state)
            for old in durable.steps(self.paths.weights) if self.prunes else ():
                if old < min(step, manifest.meta["oldest_served"]):
                    self.stage.remove(self.paths.weight(old))

    async def publish(self, step, state):
        if step in self.unpublished:
            return
        if self.memory is not None:
            self._publish(self.memory, step, state)
            await asyncio.sleep(self.copy_delay_s)
            if not memory.outlives(self.config, step):
                return
        self._publish(self.stage, step, state)

    def _publish(self, stage, step, state):
        directory = stage.begin(f"weights_{step}")
        (directory / "model.safetensors").write_text(state)
        (directory / "config.json").write_bytes((MODEL / "config.json").read_bytes())
        weights.commit(stage, directory, step=step, attempt=self.record.attempt)

    async def batch(self, step):
        while not batchlog.is_ready(self.paths, step):
            assert self.process.returncode is None, await self.wait()
            await asyncio.sleep(0.002)

    def samples(self, step):
        return batchlog.read(self.paths, step)[0]

    def rows(self, role):
        return metrics.read(self.paths.metric(role))


async def complete(config, *servers):
    run = Run(config, *(server.url for server in servers))
    await run.start()
    await run.finish()
    await run.close(0)
    return run


def parts(run):
    """What two runs are compared by."""
    found = digest.parts(run.paths.root)
    assert {f"batches/step_{step}" for step in range(STEPS)} <= set(found)
    return found


def check_sample(sample, policy):
    prompt = sample.mask.index(True)
    count = len(sample.token_ids)
    assert sample.mask == [False] * prompt + [True] * (count - prompt)
    assert [value < 0.0 for value in sample.logprobs] == sample.mask
    assert [(v.step, v.start, v.end) for v in sample.versions] == [(policy, prompt, count)]
    assert (sample.token_ids[-1] == END) == (sample.finish_reason == "stop")
    assert 0.0 <= sample.reward <= 1.0
