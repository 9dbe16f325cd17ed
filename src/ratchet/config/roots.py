"""What a program reads: the facts that every run has, and the sections of its programs."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator
from pydantic_config import BaseConfig

from ratchet.config.inference import InferenceConfig, WeightsConfig
from ratchet.config.launching import LaunchConfig, LogConfig, ReportConfig, SlurmConfig, TrackerConfig
from ratchet.config.marks import Announced, Fixed, Free, Positive
from ratchet.config.model import CkptConfig, ModelConfig
from ratchet.config.orchestrator import OrchestratorConfig
from ratchet.config.trainer import DataConfig, RLTrainerConfig, TrainerConfig


class RunConfig(BaseConfig):
    """The facts that every run has."""

    model: ModelConfig
    output_dir: Free[Path] = Path("outputs")
    """The run directory."""
    max_steps: Free[Positive]
    """The step at which the run ends: absolute, also when it is resumed."""
    seed: Fixed[int] = 0
    ckpt: CkptConfig | None = None
    accept_changes: Free[list[str]] = []
    """Inputs that may differ from those that the run began with, each as GROUP=VALUE, which a refusal prints. May be
    repeated: a value accepts one content."""
    log: LogConfig = LogConfig()
    launch: LaunchConfig = LaunchConfig()
    slurm: SlurmConfig | None = None
    tracker: TrackerConfig = TrackerConfig()
    report: ReportConfig = ReportConfig()

    SECTIONS: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _hoist(cls, data: Any) -> Any:
        """A file given to `--trainer @` may carry root facts: move them up, where the root has none."""
        if not isinstance(data, dict):
            return data
        facts = set(cls.model_fields) - set(cls.SECTIONS)
        for section in cls.SECTIONS:
            inner = data.get(section)
            if isinstance(inner, dict):
                for key in facts & set(inner):
                    data[key] = _fill(data.get(key), inner.pop(key))
        return data

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        trainer: TrainerConfig = getattr(self, "trainer", TrainerConfig())
        if trainer.nnodes > 1 and trainer.rendezvous is None and self.slurm is None:
            raise ValueError("several nodes need trainer.rendezvous = 'HOST:PORT', an address of node 0")
        return self


class SFTConfig(RunConfig):
    """Supervised fine-tuning."""

    data: DataConfig
    trainer: TrainerConfig = TrainerConfig()

    SECTIONS: ClassVar[tuple[str, ...]] = ("trainer", "data")


class RLConfig(RunConfig):
    """Asynchronous reinforcement learning."""

    deterministic: Fixed[bool] = False
    """Batch k is sampled by policy max(0, k - max_async_level) exactly: the whole run repeats bit for bit."""
    max_async_level: Announced[int] = Field(default=1, ge=0)
    """How many steps generation may run ahead of training."""
    max_off_policy_steps: Announced[int] = Field(default=8, ge=0)
    """A rollout with a token older than this many steps is dropped when its batch is made."""
    trainer: RLTrainerConfig = RLTrainerConfig()
    orchestrator: OrchestratorConfig = OrchestratorConfig()
    inference: InferenceConfig | None = None
    weights: WeightsConfig = WeightsConfig()

    SECTIONS: ClassVar[tuple[str, ...]] = ("trainer", "orchestrator", "inference")

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        is_apart = self.slurm is not None and self.slurm.executor == "slurm"
        if is_apart and self.weights.publish_interval > 1:
            raise ValueError(
                "weights.publish_interval must be 1 with --slurm: a job on another machine than the trainer's sees "
                "only the policies that are on the disk"
            )
        return self

    @property
    def ahead(self) -> int:
        """How many policies before that of a checkpoint a resume there needs: they sample its first batches."""
        return self.max_async_level if self.deterministic else 0


class ServerConfig(RLConfig):
    """What the `inference` program reads: a run's file, or one that holds only a model and its own section."""

    max_steps: Free[Positive] = 1
    inference: InferenceConfig | None = InferenceConfig()


def _fill(value: Any, more: Any) -> Any:
    """`value` where it is given, completed by `more`."""
    if isinstance(value, dict) and isinstance(more, dict):
        return {key: _fill(value.get(key), more.get(key)) for key in {**more, **value}}
    return more if value is None else value
