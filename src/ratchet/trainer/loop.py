"""The trainer's story: restore, then read, update, record, publish, save, one step after the other."""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from ratchet import batchlog, checkpoint, durable, metrics
from ratchet.attempts import Assignment
from ratchet.chat import Chat
from ratchet.config import RLConfig, SFTConfig
from ratchet.errors import Fenced, Stopped
from ratchet.inputs import files
from ratchet.inputs.seen import Guard
from ratchet.inputs.tree import Tree
from ratchet.log import LOGGER
from ratchet.mirror.upload import Uploader
from ratchet.models.check_policy import check_policy
from ratchet.models.limits import limits_of
from ratchet.models.trainable import build_frame, build_trainable
from ratchet.paths import RunPaths
from ratchet.records import Progress
from ratchet.timeline import Timeline
from ratchet.trainer import rows, schedule
from ratchet.trainer.publish import Publisher
from ratchet.trainer.sft_data import SFTSource, data_inputs
from ratchet.trainer.source import Batch, LogSource, Source
from ratchet.trainer.state import Checkpointer, TrainerState
from ratchet.trainer.update import Outcome, open_updater
from ratchet.trainer.world import World


def inputs_of(config: SFTConfig | RLConfig) -> Tree:
    """What every incarnation of a trainer reads, besides the weights that it begins with. Raises: Refusal"""
    is_rl = isinstance(config, RLConfig)
    found = files.of_program(samples=is_rl) | files.of_model(config.model)
    return found | (data_inputs(config.data) if isinstance(config, SFTConfig) else {})


def open_source(
    config: SFTConfig | RLConfig, paths: RunPaths, is_stopping: Callable[[], bool], *, is_heard: bool = True
) -> Source:
    """Demonstrations or the batch log, by the kind of the run."""
    if isinstance(config, SFTConfig):
        chat = Chat.load(config.model.tokenizer or config.model.name)
        return SFTSource(config.data, chat, config.seed, limits_of(config.model), is_heard=is_heard)
    return LogSource(paths, is_stopping)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """An update whose figures nobody has read."""

    batch: Batch
    outcome: Outcome
    progress: Progress
    """After it."""
    at: float
    wait_s: float


class Trainer:
    """One trainer of one attempt; the same from a fresh start and from a checkpoint."""

    def __init__(self, assignment: Assignment, world: World, is_stopping: Callable[[], bool]) -> None:
        self._assignment = assignment
        self._config: SFTConfig | RLConfig = assignment.config
        self._world = world
        self._timeline = Timeline(assignment.stage if world.is_first else None)
        opened = time.perf_counter()
        self._is_stopping = is_stopping
        model, base = self._build()
        self._updater = open_updater(model, self._config, world)
        self._state = TrainerState(model, self._updater.optimizer, Progress(), base)
        self._mirror = Uploader.of(assignment) if world.is_first else None
        self._oldest_served = batchlog.oldest_served(assignment.paths, assignment.plan.step - 1)
        self._publisher = Publisher(assignment, world, self._timeline)
        self._begun: Begun | None = None
        self._read_at = 0.0
        self._source = open_source(
            self._config, assignment.paths, self._is_interrupted, is_heard=world.is_first
        )
        self._checkpointer = Checkpointer(
            assignment,
            world,
            self._timeline,
            on_commit=self._on_commit,
            data_rows=self._source.data_rows,
        )
        if assignment.plan.from_checkpoint:
            self._checkpointer.restore(self._state, assignment.plan.step)
        self._timeline.add("start", assignment.plan.step, time.perf_counter() - opened)

    def _build(self) -> tuple[PreTrainedModel, str | None]:
        """The model, and the digest of its base where it has adapters.

        A whole checkpoint needs no base. Otherwise its bytes are verified while it is loaded, and where a run begins
        with it, what is trained is compared with what its own code computes. Raises: Refusal
        """
        run, model = self._assignment, self._config.model
        guard = Guard(run, "trainer", writes=self._world.is_first)
        guard.add(inputs_of(self._config))
        if run.plan.from_checkpoint and model.lora is None:
            schema = durable.read_manifest(run.paths.checkpoint(run.plan.step)).meta["schema"]
            if (found := build_frame(model, schema)) is not None:
                return found, None
        with files.verified_weights(model, guard.inputs):
            found, base = build_trainable(model, seed=self._config.seed)
        if not run.plan.from_checkpoint and self._world.is_first:
            check_policy(found)
        return found, base

    @property
    def _step(self) -> int:
        return self._state.progress.step

    def run(self) -> None:
        """Train until `max_steps`. Raises: Stopped at a step boundary, when asked to; PoisonBatch; SaveFailed"""
        try:
            self._train()
        except Fenced:
            raise
        except BaseException:
            self._publisher.settle()
            self._checkpointer.settle()
            raise

    def _train(self) -> None:
        if isinstance(self._config, RLConfig):
            self._publisher.publish(self._state.model, self._step)
        while self._step < self._config.max_steps:
            started = time.perf_counter()
            step = self._step
            if not self._world.share(self._world.is_first and self._may_go_on(step)):
                self._stop()
            batch = self._source.read(self._state.progress)
            waited = time.perf_counter()
            self._timeline.add("wait", step + 1, waited - started)
            outcome = self._updater.begin(batch, step, self._factor(step))
            rows.advance(self._state.progress, batch)
            self._record()  # the update before this one, while the device computes this one
            progress = copy.copy(self._state.progress)
            self._begun = Begun(
                batch=batch, outcome=outcome, progress=progress, at=waited, wait_s=waited - started
            )
            if self._reads_now():
                self._record()
            self._publish(batch)
            self._checkpointer.poll()
            if self._is_due():
                self._save()
        self._publisher.wait()
        self._checkpointer.close()
        # A trainer that died between its last commit and the retention left this to the next one.
        self._retain(self._step)
        self._close_mirror()

    def _may_go_on(self, step: int) -> bool:
        """Rank 0 decides for all, so that all stop at the same step."""
        return not self._is_interrupted() and self._source.wait(step)

    def _is_interrupted(self) -> bool:
        """Whether this trainer is asked to stop. Raises: what publishing failed of: no batch comes without a policy"""
        self._publisher.poll()
        return self._is_stopping()

    def _factor(self, step: int) -> float:
        return schedule.factor(self._config.trainer.scheduler, self._config.max_steps, step)

    def _reads_now(self) -> bool:
        """Whether what follows a step needs its figures: a policy that is published, a checkpoint. On a CPU the step
        is over in any case."""
        is_late = isinstance(self._config, SFTConfig) and self._world.device.type != "cpu"
        return not is_late or self._is_due() or self._step == self._config.max_steps

    def _record(self) -> None:
        """Append the row of the update that was begun last, if it has none yet. It is not flushed: a checkpoint does
        that. Waits for: the device. Raises: PoisonBatch
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        figures = begun.outcome.read()
        now = time.perf_counter()
        train_s = now - max(begun.at, self._read_at)
        self._read_at = now
        if not self._world.is_first:
            return
        batch, progress = begun.batch, begun.progress
        row = rows.exact_row(self._config, progress, batch, figures, self._factor(progress.step - 1))
        self._timeline.add("train", progress.step, train_s)
        row |= {
            "time/at_s": round(time.time(), 3),
            "time/wait_s": round(begun.wait_s, 4),
            "time/train_s": round(train_s, 4),
            "perf/tokens_per_s": round(batch.tokens / train_s, 1),
        }
        if self._mirror is not None:
            row["fault/mirror_failures"] = self._mirror.take_failures()
        metrics.append(self._assignment.stage, self._assignment.paths.metric("trainer"), row)

    def _publish(self, batch: Batch) -> None:
        """RL publishes every policy, SFT those of its checkpoints. A checkpoint waits for its policy."""
        if isinstance(self._config, RLConfig):
            self._oldest_served = batch.oldest_served or 0
            self._publisher.publish(self._state.model, self._step, functools.partial(self._prune, self._step))
        elif self._is_due() or self._step == self._config.max_steps:
            self._publisher.publish(self._state.model, self._step)

    def _is_due(self) -> bool:
        ckpt = self._config.ckpt
        return ckpt is not None and ckpt.is_due(self._step, self._config.max_steps)

    def _save(self) -> None:
        """Waits for: the policies that a resume at this checkpoint needs, on the disk."""
        self._publisher.keep(range(max(0, self._step - self._ahead), self._step + 1))
        started = time.perf_counter()
        if self._checkpointer.save(self._state):
            LOGGER.info("checkpoint %d, the loop waited %.3f s", self._step, time.perf_counter() - started)

    def _on_commit(self, step: int) -> None:
        """The mirror takes what it needs before anything of it may go."""
        if self._mirror is not None:
            self._mirror.offer(step)
        self._retain(step)

    def _close_mirror(self) -> None:
        if self._mirror is not None:
            self._mirror.close()

    def _retain(self, step: int) -> None:
        """Let go of the checkpoints that no rule keeps, then of what only they needed. Repeating it changes nothing.

        Raises: Damaged if the newest checkpoint does not verify.
        """
        if not self._world.is_first:
            return
        if self._config.ckpt is not None:
            checkpoint.retain(self._assignment.stage, self._config.ckpt)
        self._prune(step)

    @property
    def _ahead(self) -> int:
        return self._config.ahead if isinstance(self._config, RLConfig) else 0

    def _prune(self, step: int) -> None:
        """Drop what nobody can need once policy or checkpoint `step` is there. SFT has no server to wait for."""
        self._publisher.prune(self._oldest_served, step, self._ahead)
        is_rl = isinstance(self._config, RLConfig)
        checkpoint.prune(
            self._assignment.stage,
            self._config.ckpt,
            published=step,
            oldest_served=self._oldest_served if is_rl else step,
            saving=self._checkpointer.saving,
            async_level=self._config.max_async_level if isinstance(self._config, RLConfig) else 0,
        )

    def _stop(self) -> None:
        """Asked to stop before an update: save policy k where checkpoints are on. Raises: Stopped"""
        self._record()
        self._publisher.wait()
        if self._config.ckpt is not None and self._config.ckpt.save and self._step > 0:
            if isinstance(self._config, SFTConfig):
                self._publisher.publish(self._state.model, self._step)
            self._save()
            self._checkpointer.close()
        self._close_mirror()
        raise Stopped(f"stopped at step {self._step}")
