"""The trainer's own knobs, of SFT and of RL."""

from typing import Literal

from pydantic import Field, model_validator
from pydantic_config import BaseConfig

from ratchet.config.marks import Announced, Fixed, Free, Positive


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
    """Compute a short prompt of several sequences once; of models that are known, and not with `compile` or
    `cuda_graphs`."""
    activation_checkpointing: Announced[Literal["none", "attention", "full"]] = "none"
    """What the backward pass computes again. `full` keeps only the input of each decoder layer; `attention` the result
    of its attention as well: little memory, and most of the work where rows are long. `none` keeps all, logits too."""
    compile: Announced[bool] = False
    """Compile the decoder layers (torch.compile). Micro-batches are padded to few shapes, each compiled once."""
    cuda_graphs: Announced[bool] = False
    """Record the passes over a micro-batch of each shape as one CUDA graph, so that the host launches them by one call.
    Micro-batches are padded to few shapes. For one process on one GPU, with `activation_checkpointing = "none"`; of
    the models that are known it takes `sdpa` in place of `attention = "eager"` there."""
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
        if self.cuda_graphs and self.ranks > 1:
            raise ValueError(
                f"cuda_graphs is for one process, and there are {self.ranks} (nnodes x nproc): leave it out"
            )
        if self.cuda_graphs and self.activation_checkpointing != "none":
            raise ValueError(
                f"cuda_graphs does not go with activation_checkpointing = {self.activation_checkpointing!r}: leave "
                "one of them out"
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
    """SFT data: rows of `messages`, of `prompt` and `completion`, of Alpaca's columns or of ShareGPT's."""

    name: Free[str]
    """A .jsonl, .json (each also as .gz) or .parquet file, or the hub name of a dataset. Its content must stay,
    wherever it lies."""
    split: Fixed[str] = "train"
    """The split of a hub dataset."""
    batch_size: Announced[Positive] = 64
    """Samples of one step."""
    max_length: Announced[Positive] = 2048
    """Longer samples are cut at this many tokens."""
    max_skipped: Announced[float] = Field(default=0.01, ge=0, le=1)
    """Rows that cannot be trained are skipped and counted: the chat template refuses them, the answer is cut away, the
    model lacks a token. More than this share of the rows consumed so far (at first, of 512 or all) ends the run."""
    shuffle: Fixed[bool] = True
