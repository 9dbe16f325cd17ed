"""The configuration: a fact is written once, and every program receives the whole tree.

Each leaf carries a mark that says what may happen to it on resume:
`Free` may change silently, `Announced` is printed and recorded, `Fixed` is refused.
"""

import enum
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_config import BaseConfig


class OnResume(enum.Enum):
    """What a changed value means when a run is resumed."""

    FREE = "free"
    ANNOUNCED = "announced"
    FIXED = "fixed"


T = TypeVar("T")
Free = Annotated[T, OnResume.FREE]
Announced = Annotated[T, OnResume.ANNOUNCED]
Fixed = Annotated[T, OnResume.FIXED]
Positive = Annotated[int, Field(ge=1)]


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

    name: Fixed[str]
    """A directory with a Hugging Face model, or a hub name."""
    random_init: Fixed[bool] = False
    """Build the model from its config with weights drawn from the run's seed, instead of loading weights."""
    tokenizer: Fixed[str | None] = None
    """A directory or hub name of the tokenizer; by default the model's own."""
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
        return step == max_steps or (self.interval is not None and step % self.interval == 0)


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


class OptimConfig(BaseConfig):
    """AdamW on everything, or Muon on the 2-D matrices inside the blocks and AdamW on the rest."""

    type: Fixed[Literal["adamw", "muon"]] = "adamw"
    lr: Announced[float] = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""
    betas: Announced[tuple[float, float]] = (0.9, 0.95)
    eps: Announced[float] = 1e-8
    weight_decay: Announced[float] = Field(default=0.0, ge=0)
    muon_lr: Announced[float] = Field(default=3e-2, gt=0)
    """Peak learning rate of Muon; an update is scaled by 0.2 * sqrt(max(rows, columns))."""
    muon_momentum: Announced[float] = 0.95
    max_norm: Announced[float | None] = 1.0
    """Clip the gradient to this norm."""


class SchedulerConfig(BaseConfig):
    """The learning rate as a function of the step: nothing about it is accumulated."""

    type: Announced[Literal["constant", "linear", "cosine"]] = "constant"
    warmup_steps: Announced[int] = Field(default=0, ge=0)
    horizon_steps: Announced[Positive | None] = None
    """Where the decay ends; `max_steps` by default. Set it when the run may be extended later."""
    min_lr_ratio: Announced[float] = Field(default=0.0, ge=0, le=1)
    """The learning rate at the horizon and after it, relative to the peak."""


class ParallelConfig(BaseConfig):
    """How the trainer's processes share the model."""

    replicate: Announced[Positive] = 1
    """So many copies of the model, each sharded over an equal part of the processes (HSDP); 1 shards over all."""


class TrainerConfig(BaseConfig):
    """The trainer's own knobs."""

    optim: OptimConfig = OptimConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    micro_batch_tokens: Announced[Positive] = 8192
    """Upper bound for rows x padded length of one forward pass of one process; gradients accumulate over them."""
    precision: Announced[Literal["bf16", "fp32"]] = "bf16"
    """bf16: the passes run on a copy of the weights in bf16; weights, sums of gradients and optimizer stay in fp32."""
    share_prompts: Announced[bool] = True
    """Compute a short prompt of several sequences once; of models that are known, and not with `compile`."""
    activation_checkpointing: Announced[Literal["none", "attention", "full"]] = "none"
    """What the backward pass computes again. `full` keeps only the input of each decoder layer; `attention` the result
    of its attention as well: little memory, and most of the work where rows are long. `none` keeps all, logits too."""
    compile: Announced[bool] = False
    """Compile the decoder layers (torch.compile). Micro-batches are padded to few shapes, each compiled once."""
    nproc: Announced[Positive] = 1
    """Trainer processes on a machine, over which the model is sharded; a GPU each, where there are GPUs."""
    nnodes: Announced[Positive] = 1
    """Machines that train together, `nproc` processes on each; all see the run directory."""
    node_rank: Free[int] = Field(default=0, ge=0)
    """Which of them this is. Node 0 opens the run and decides; the others join it with the same command."""
    rendezvous: Free[str | None] = None
    """`host:port` of node 0, where the processes of several machines meet; the port is free to choose. `--slurm` finds
    one by itself."""
    threads: Announced[Positive] = 1
    """CPU threads of each trainer process; part of what makes results repeatable."""
    device: Free[Literal["auto", "cpu", "cuda"]] = "auto"

    @model_validator(mode="after")
    def _check(self) -> "TrainerConfig":
        if self.ranks % self.parallel.replicate:
            raise ValueError(
                f"parallel.replicate {self.parallel.replicate} must divide the {self.ranks} processes "
                "(nnodes x nproc)"
            )
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank {self.node_rank} must be below nnodes {self.nnodes}")
        host, _, port = (self.rendezvous or "").rpartition(":")
        if self.rendezvous is not None and not (host and port.isdigit()):
            raise ValueError(
                f"rendezvous must be 'HOST:PORT', an address of node 0; {self.rendezvous!r} was given"
            )
        return self

    @property
    def ranks(self) -> int:
        """Trainer processes on all machines."""
        return self.nnodes * self.nproc


class LossConfig(BaseConfig):
    """The policy-gradient loss: clipped importance ratio, group-relative advantage, token mean."""

    clip_low: Announced[float] = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped at 1 - clip_low."""
    clip_high: Announced[float] = Field(default=0.28, gt=0)
    """The ratio is clipped at 1 + clip_high."""
    mask_low: Announced[float] = Field(default=0.125, ge=0, lt=1)
    """A token whose ratio lies below is left out of the loss."""
    mask_high: Announced[float] = Field(default=8.0, gt=1)
    """A token whose ratio lies above is left out of the loss."""


class RLTrainerConfig(TrainerConfig):
    """The trainer's own knobs in RL."""

    loss: LossConfig = LossConfig()


class DataConfig(BaseConfig):
    """SFT data: rows of `messages`, or of `prompt` and `completion`."""

    name: Fixed[str]
    """A .jsonl or .parquet file, or the hub name of a dataset."""
    split: Fixed[str] = "train"
    """The split of a hub dataset."""
    batch_size: Announced[Positive] = 64
    """Samples of one step."""
    max_length: Announced[Positive] = 2048
    """Longer samples are cut at this many tokens."""
    shuffle: Fixed[bool] = True


class SamplingConfig(BaseConfig):
    """How rollouts are sampled. Top-p and top-k do not exist here: they would falsify the logprobs."""

    max_tokens: Announced[Positive] = 256
    """Tokens of one turn at most."""
    temperature: Announced[float] = Field(default=1.0, gt=0)


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
    temperature: Announced[float] = Field(default=1.0, gt=0)

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

    env: list[EnvConfig] = []
    """The environments of the run: `[[orchestrator.env]]` tables."""
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


class RunConfig(BaseConfig):
    """The facts that every run has."""

    model: ModelConfig
    output_dir: Free[Path] = Path("outputs")
    """The run directory."""
    max_steps: Free[Positive]
    """The step at which the run ends: absolute, also when it is resumed."""
    seed: Fixed[int] = 0
    ckpt: CkptConfig | None = None
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
