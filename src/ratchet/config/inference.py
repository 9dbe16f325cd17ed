"""The inference servers, and how policies reach them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_config import BaseConfig

from ratchet.config.marks import Announced, Free, Positive


class VllmConfig(BaseConfig):
    """The server of `engine = "vllm"`. Any other key here goes to vLLM: `tensor_parallel_size = 2`."""

    model_config = ConfigDict(extra="allow")

    python: Free[Path | None] = None
    """The interpreter of the environment that has vLLM; by default the one that runs this."""


class InferenceConfig(BaseConfig):
    """The inference server."""

    engine: Announced[Literal["torch", "vllm"]] = "torch"
    """The embedded engine, or a vLLM that is started in its place."""
    host: Free[str] = "127.0.0.1"
    """An address or name of this machine, of either family: `127.0.0.1`, `::1`, or `0.0.0.0` for all."""
    port: Free[Annotated[int, Field(ge=0, le=65535)]] = 8000
    """0 takes a free port; a run that starts its own server always does."""
    replicas: Free[Positive] = 1
    """Servers that a run starts, each alike and restarted alone; the memory of each comes on top."""
    devices: Free[list[str] | None] = None
    """`CUDA_VISIBLE_DEVICES` of each replica in turn: ["0", "1"], or ["0,1", "2,3"] for engines of two GPUs. By
    default several replicas take the visible GPUs in turn, one each."""
    slots: Announced[Positive] = 128
    """Sequences decoded together; a part of what makes results repeatable."""
    max_model_len: Announced[Positive] = 512
    """Prompt and completion together, in tokens."""
    dtype: Announced[Literal["float32", "bfloat16"]] = "float32"
    threads: Announced[Positive] = 1
    device: Free[Literal["auto", "cpu", "cuda"]] = "auto"
    vllm: VllmConfig = VllmConfig()

    @property
    def names(self) -> tuple[str, ...]:
        """What the servers of a run are called: in its logs, workshops and restarts."""
        return ("inference",) if self.replicas == 1 else tuple(f"inference_{i}" for i in range(self.replicas))


class WeightsConfig(BaseConfig):
    """How policies travel from the trainer to inference."""

    transport: Free[Literal["filesystem", "memory"]] = "filesystem"
    """`memory`: policies go through shared memory of the trainer's machine, and beside that onto the disk."""
    publish_interval: Free[Positive] = 1
    """With `memory`: publish every N-th policy on the disk too, besides those that a resume needs."""
    memory_dir: Free[Path] = Path("/dev/shm")
    """With `memory`: a tmpfs; a run has a directory of its own there while it runs."""

    @model_validator(mode="after")
    def _check(self) -> "WeightsConfig":
        if self.transport == "filesystem" and self.publish_interval != 1:
            raise ValueError(
                f"publish_interval {self.publish_interval} needs transport = 'memory': with 'filesystem' inference "
                "has no other way to a policy than the disk"
            )
        if not self.memory_dir.is_absolute():
            raise ValueError(f"memory_dir must be an absolute path; {str(self.memory_dir)!r} was given")
        return self
