"""How a run is started, watched, placed on machines and looked at."""

from typing import Any, Literal

from pydantic import Field
from pydantic_config import BaseConfig

from ratchet.config.marks import Free, Positive


class LogConfig(BaseConfig):
    """What the programs say."""

    level: Free[Literal["debug", "info", "warning", "error"]] = "info"


class LaunchConfig(BaseConfig):
    """How the launcher of `rl`, `sft` and `trainer` deals with a program that died or froze."""

    max_restarts: Free[int] = Field(default=3, ge=0)
    """How often each program is started again alone within the window; 0 stops the run at the first failure."""
    restart_window_s: Free[float] = Field(default=600.0, gt=0)
    """Restarts longer ago than this are forgotten."""
    backoff_s: Free[float] = Field(default=0.5, ge=0)
    """The pause before a restart; it doubles with each recent one."""
    frozen_s: Free[float] = Field(default=60.0, ge=2)
    """A program that gives no sign of life for so long is replaced. A long step or wait gives signs of life."""
    join_s: Free[float] = Field(default=600.0, gt=0)
    """How long a node of the trainer waits for the first one to open the run."""


class TrackerConfig(BaseConfig):
    """Where the metric rows are copied to, by a process of its own that training never waits for."""

    tensorboard: Free[bool] = True
    """Write `trackers/tensorboard/` in the run directory."""
    wandb: Free[str | None] = None
    """A project of Weights & Biases; needs the extra `wandb`. WANDB_MODE=offline keeps it on this machine."""


class ReportConfig(BaseConfig):
    """The page that a run leaves behind."""

    enabled: Free[bool] = True
    """Write `report.html` into the run directory when an attempt ends."""


class SlurmRoleConfig(BaseConfig):
    """What the job of one program asks for."""

    gpus: Free[int] = Field(default=0, ge=0)
    """GPUs of each machine: of each node of the trainer, of each server of inference."""
    cpus: Free[Positive | None] = None
    mem_gb: Free[Positive | None] = None
    extra: Free[dict[str, Any]] = {}
    """More of sbatch's options for this job, by name: `{constraint = "a100"}`."""


class SlurmConfig(BaseConfig):
    """Each program is a job of its own, on machines that share the run directory. Bare `--slurm` does that too."""

    executor: Free[Literal["slurm", "local"]] = "slurm"
    """submitit's executor; `local` starts the same jobs as processes of this machine."""
    partition: Free[str | None] = None
    account: Free[str | None] = None
    time_min: Free[Positive] = 1440
    """Longest duration of a job in minutes; one that reaches it saves and is queued again."""
    grace_s: Free[Positive] = 120
    """So many seconds before that it is told to save."""
    requeues: Free[int] = Field(default=100, ge=0)
    """How often a job that reached its time is queued again."""
    wait_s: Free[float] = Field(default=3600.0, gt=0)
    """How long orchestrator and inference wait for a trainer that is not there (yet, or again) before they end."""
    wait: Free[bool] = False
    """Stay until the jobs have ended, and end with their exit code, instead of returning once they are queued."""
    host: Free[str] = "0.0.0.0"
    """The interface on which inference listens; with `executor = "local"` always the loopback one."""
    extra: Free[dict[str, Any]] = {}
    """More of sbatch's options for every job, by name: `{qos = "high", exclusive = true}`."""
    trainer: SlurmRoleConfig = SlurmRoleConfig()
    orchestrator: SlurmRoleConfig = SlurmRoleConfig()
    inference: SlurmRoleConfig = SlurmRoleConfig()
