"""Which model is trained, and what its checkpoints are."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_config import BaseConfig

from ratchet.config.marks import Announced, Fixed, Free, Positive


class LoraConfig(BaseConfig):
    """Low-rank adapters beside linear layers; only they are trained. Needs the extra `lora` (peft)."""

    rank: Fixed[Positive] = 16
    """Inner dimension of an adapter."""
    alpha: Fixed[float] = Field(default=32.0, gt=0)
    """What an adapter adds is scaled by alpha / rank."""
    dropout: Announced[float] = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that each update leaves out, drawn from the seed and the step."""
    target_modules: Fixed[list[str]] = [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
    """Which linear layers have an adapter, by the end of their name."""


class ModelConfig(BaseConfig):
    """Which model, and where its tokenizer comes from."""

    name: Free[str]
    """A directory with a Hugging Face model, or a hub name. Its content must stay, wherever it lies."""
    random_init: Fixed[bool] = False
    """Build the model from its config with weights drawn from the run's seed, instead of loading weights."""
    tokenizer: Free[str | None] = None
    """A directory or hub name of the tokenizer; by default the model's own. Its content must stay."""
    attention: Announced[Literal["sdpa", "eager", "flash_attention_2"]] = "sdpa"
    """The attention kernel of transformers. On a CPU in bf16, eager trains faster."""
    freeze: Fixed[list[str]] = []
    """Regular expressions: a parameter in whose name one is found keeps its value."""
    lora: LoraConfig | None = None

    @field_validator("freeze")
    @classmethod
    def _check_freeze(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.freeze and self.lora is not None:
            raise ValueError(
                "freeze and lora exclude each other: with lora everything but the adapters is frozen"
            )
        return self


class CkptConfig(BaseConfig):
    """Checkpoints of the whole run. Off unless this section or any `--ckpt` flag is given."""

    interval: Free[Positive | None] = None
    """Save after every N steps; without it only the final step is saved."""
    save: Free[bool] = True
    """False saves nothing, also where another `--ckpt` flag is given."""
    save_async: Free[bool] = False
    """Write in the background: the training loop waits for the copy of its state only."""
    keep_last: Free[Positive | None] = None
    """Keep the newest K checkpoints."""
    keep_interval: Free[Positive | None] = None
    """Also keep every checkpoint whose step is a multiple of N."""
    resume_step: Free[Annotated[int, Field(ge=-1)] | None] = None
    """Continue from this step; -1 means the newest one."""
    max_failed_saves: Free[Positive] = 3
    """So many saves in a row may fail (a full disk) before the run stops with exit code 74."""
    on_corrupt: Free[Literal["stop", "fallback"]] = "stop"
    """A damaged checkpoint stops the start, or is moved aside so that an older one serves."""
    mirror: Free[str | None] = None
    """Also upload every checkpoint to this address, `s3://bucket/prefix` or any other of fsspec's."""
    mirror_keep_last: Free[Positive | None] = None
    """Keep the newest K checkpoints in the mirror; `keep_last` by default. `keep_interval` holds there too."""

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether the state after `step` updates is saved."""
        return self.save and (step == max_steps or (self.interval is not None and step % self.interval == 0))
