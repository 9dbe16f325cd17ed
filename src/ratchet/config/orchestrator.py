"""The orchestrator's own knobs."""

import math
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from pydantic_config import BaseConfig

from ratchet.config.marks import Announced, Free, Positive

LOWEST_TEMPERATURE = 0.01
"""vLLM samples at this one whatever lower one it is asked for, but 0."""


def is_temperature(value: float) -> bool:
    """Whether every engine samples at this temperature as it is asked to; at 0 it takes the most probable token."""
    return value == 0 or LOWEST_TEMPERATURE <= value < math.inf


class SamplingConfig(BaseConfig):
    """How rollouts are sampled. Top-p and top-k do not exist here: they would falsify the logprobs."""

    max_tokens: Announced[Positive] = 256
    """Tokens of one turn at most; where less than that is left of the server's `max_model_len`, what is left."""
    temperature: Announced[float] = Field(default=1.0, gt=0)
    """At least 0.01."""


class EnvConfig(BaseConfig):
    """One environment."""

    id: Announced[str]
    """`reverse_text`, `rows`, or a class of your own as `module:Class`."""
    name: Announced[str | None] = None
    """How metrics call it; the id by default."""
    weight: Announced[float] = Field(default=1.0, gt=0)
    """Its share of the draws, relative to the other environments."""
    args: Announced[dict[str, Any]] = {}
    """Keyword arguments of the environment."""
    inputs: Free[list[Path]] = []
    """Files and directories that its code reads besides: a run goes on only with the same content."""

    @property
    def label(self) -> str:
        return self.name or self.id.rpartition(":")[2]


class EvalConfig(BaseConfig):
    """Held-out evaluation during the run."""

    interval: Announced[Positive] = 10
    """Evaluate the policy of every N-th step, and the last one."""
    at_start: Announced[bool] = True
    """Also evaluate the initial policy."""
    tasks: Announced[Positive] = 64
    """Held-out tasks of each environment."""
    rollouts_per_task: Announced[Positive] = 1
    temperature: Announced[float] = Field(default=1.0, ge=0)
    """0 takes the most probable token each time (greedy); otherwise at least 0.01."""

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether policy `step` is evaluated."""
        if step == 0:
            return self.at_start
        return step == max_steps or step % self.interval == 0


class ClientConfig(BaseConfig):
    """How the orchestrator reaches inference."""

    base_url: Free[list[str]] = ["http://127.0.0.1:8000"]
    """A vLLM-shaped server, or several. Ignored when an [inference] section makes the run start its own."""
    wait_s: Free[float] = Field(default=60.0, gt=0)
    """How long to wait while no server answers."""
    timeout_s: Free[float] = Field(default=600.0, gt=0)
    """Longest duration of one request."""
    retries: Free[int] = Field(default=8, ge=0)
    """How often a torn request is played again, with the same seed."""
    liveness_s: Free[float] = Field(default=10.0, gt=0)
    """A server that does not answer `/health` for so long gets nothing; others play what it was playing."""
    slow_start_s: Free[float] = Field(default=2.0, ge=0)
    """After new weights or a restart a server's share of the requests grows from an eighth to all over so long."""

    @field_validator("base_url", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("base_url")
    @classmethod
    def _check_urls(cls, urls: list[str]) -> list[str]:
        urls = [url.rstrip("/") for url in urls]
        if not urls:
            raise ValueError("base_url must name a server")
        if len(set(urls)) < len(urls):
            raise ValueError(f"base_url names a server twice ({', '.join(urls)})")
        return urls


class OrchestratorConfig(BaseConfig):
    """The orchestrator's own knobs."""

    env: Free[list[EnvConfig]] = []
    """The environments of the run: `[[orchestrator.env]]` tables. A change of one must be accepted by its value."""
    batch_size: Announced[Positive] = 256
    """Rollouts of one step."""
    group_size: Announced[Positive] = 16
    """Rollouts of one task; the advantage is relative to their mean."""
    sampling: SamplingConfig = SamplingConfig()
    eval: EvalConfig | None = None
    client: ClientConfig = ClientConfig()
    divide_by_std: Announced[bool] = False
    """Divide advantages by the group's standard deviation (GRPO's original form)."""

    @model_validator(mode="after")
    def _check(self) -> "OrchestratorConfig":
        if self.group_size < 2:
            raise ValueError("group_size must be at least 2: one rollout has no siblings to be compared with")
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of group_size {self.group_size}"
            )
        labels = [env.label for env in self.env]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"two environments are called the same ({', '.join(labels)}); give each a `name`"
            )
        return self

    @property
    def groups_per_batch(self) -> int:
        return self.batch_size // self.group_size
