"""The trainer's story: restore, then read, update, record, publish, save, one step after the other."""

import time
from collections.abc import Callable
from typing import Any

import torch

from ratchet import checkpoint, metrics
from ratchet.attempts import Assignment
from ratchet.chat import Chat
from ratchet.config import RLConfig, SFTConfig
from ratchet.errors import Stopped
from ratchet.log import LOGGER
from ratchet.models.build import build
from ratchet.records import Progress
from ratchet.rng import derive
from ratchet.trainer import schedule
from ratchet.trainer.optim import Optimizer
from ratchet.trainer.publish import Publisher
from ratchet.trainer.sft_data import SFTSource
from ratchet.trainer.source import Batch, LogSource, Source
from ratchet.trainer.state import Checkpointer, TrainerState
from ratchet.trainer.update import Updater, choose_loss, shard
from ratchet.trainer.world import World


class Trainer:
    """One trainer of one attempt; the same from a fresh start and from a checkpoint."""

    def __init__(self, assignment: Assignment, world: World, is_stopping: Callable[[], bool]) -> None:
        self._assignment = assignment
        self._config: SFTConfig | RLConfig = assignment.config
        self._world = world
        self._is_stopping = is_stopping
        model = build(self._config.model, seed=self._config.seed)
        policy = shard(model, self._config.trainer, world)
        optimizer = Optimizer(model, self._config.trainer.optim)
        self._state = TrainerState(model, optimizer, Progress())
        self._updater = Updater(policy, optimizer, world, self._config.trainer, choose_loss(self._config))
        self._checkpointer = Checkpointer(assignment, world, on_commit=self._prune)
        self._oldest_served = 0
        self._publisher = Publisher(assignment, world)
        self._source = self._open_source()
        if assignment.plan.from_checkpoint:
            self._checkpointer.restore(self._state, assignment.plan.step)

    def _open_source(self) -> Source:
        config = self._config
        if isinstance(config, SFTConfig):
            return SFTSource(config.data, Chat.load(config.model.tokenizer or config.model.name), config.seed)
        return LogSource(self._assignment.paths, self._is_stopping)

    @property
    def _step(self) -> int:
        return self._state.progress.step

    def run(self) -> None:
        """Train until `max_steps`. Raises: Stopped at a step boundary, when asked to."""
        if isinstance(self._config, RLConfig):
            self._publisher.publish(self._state.model, self._step)
        while self._step < self._config.max_steps:
            started = time.perf_counter()
            step = self._step
            if not self._world.share(not self._is_stopping() and self._source.wait(step)):
                self._stop()
            batch = self._source.read(step)
            waited = time.perf_counter()
            torch.manual_seed(derive(self._config.seed, "trainer", step, self._world.rank))
            figures = self._updater.update(batch, step, self._factor(step))
            self._advance(batch)
            trained = time.perf_counter()
            self._record(batch, figures, wait_s=waited - started, train_s=trained - waited)
            self._publish(batch)
            self._checkpointer.poll()
            if self._is_due():
                self._save()
        self._checkpointer.wait()

    def _factor(self, step: int) -> float:
        return schedule.factor(self._config.trainer.scheduler, self._config.max_steps, step)

    def _advance(self, batch: Batch) -> None:
        progress = self._state.progress
        progress.step += 1
        progress.total_samples += len(batch.examples)
        progress.total_tokens += batch.tokens
        progress.total_problems += batch.problems

    def _record(self, batch: Batch, figures: dict[str, float], *, wait_s: float, train_s: float) -> None:
        """Append the row of the step. It is not flushed: a checkpoint does that."""
        if not self._world.is_first:
            return
        optim, factor = self._config.trainer.optim, self._factor(self._step - 1)
        row: dict[str, Any] = {
            "step": self._step,
            "loss": figures.pop("loss"),
            "lr": optim.lr * factor,
            **({"lr/muon": optim.muon_lr * factor} if optim.type == "muon" else {}),
            **figures,
            "tokens": batch.tokens,
            "tokens/trained": batch.trained_tokens,
            "samples": len(batch.examples),
            **batch.metrics,
            "progress/total_samples": self._state.progress.total_samples,
            "progress/total_tokens": self._state.progress.total_tokens,
            "time/wait_s": round(wait_s, 4),
            "time/train_s": round(train_s, 4),
            "perf/tokens_per_s": round(batch.tokens / train_s, 1),
        }
        if isinstance(self._config, RLConfig):
            row["progress/total_problems"] = self._state.progress.total_problems
        metrics.append(self._assignment.stage, self._assignment.paths.metric("trainer"), row)

    def _publish(self, batch: Batch) -> None:
        """RL publishes every policy, SFT those of its checkpoints."""
        if isinstance(self._config, RLConfig):
            self._publisher.publish(self._state.model, self._step)
            self._oldest_served = batch.oldest_served or 0
            if self._world.is_first:
                self._prune(self._step)
        elif self._is_due() or self._step == self._config.max_steps:
            self._publisher.publish(self._state.model, self._step)

    def _is_due(self) -> bool:
        ckpt = self._config.ckpt
        return ckpt is not None and ckpt.is_due(self._step, self._config.max_steps)

    def _save(self) -> None:
        started = time.perf_counter()
        self._checkpointer.save(self._state)
        LOGGER.info("checkpoint %d, the loop waited %.3f s", self._step, time.perf_counter() - started)

    def _prune(self, step: int) -> None:
        """Drop what nobody can need once policy or checkpoint `step` is there. SFT has no server to wait for."""
        is_rl = isinstance(self._config, RLConfig)
        checkpoint.prune(
            self._assignment.stage,
            self._config.ckpt,
            published=step,
            oldest_served=self._oldest_served if is_rl else step,
            async_level=self._config.max_async_level if isinstance(self._config, RLConfig) else 0,
        )

    def _stop(self) -> None:
        """Asked to stop before an update: save policy k where checkpoints are on. Raises: Stopped"""
        self._checkpointer.wait()
        if self._config.ckpt is not None and self._step > 0:
            if isinstance(self._config, SFTConfig):
                self._publisher.publish(self._state.model, self._step)
            self._save()
            self._checkpointer.wait()
        raise Stopped(f"stopped at step {self._step}")
