"""From a whole model on the CPU to one that is trained: checkpointed, compiled and sharded, layer by layer.

    call of a layer ─► FSDP gathers its parameters ─► activation checkpointing ─► the compiled forward

Where results of attention are kept, the compiler decides on what is computed again: it sees the checkpointed layer.
Both replace the layer's `forward` and add no module, so names of parameters do not depend on these settings, and
FSDP's own hooks stay outside of what is compiled or computed again.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from ratchet.config import TrainerConfig
from ratchet.log import LOGGER
from ratchet.models.attention import FLEX
from ratchet.models.logprobs import Policy
from ratchet.trainer.world import World

SHAPES_AT_MOST = 256
"""Of one compiled layer. More would mean that micro-batches are not padded to few shapes."""

ATTENTION = {
    "flash",  # ours: models/flash.py
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}
"""Operators of attention, without their name spaces and overloads."""


def shard(model: PreTrainedModel, config: TrainerConfig, world: World) -> Policy:
    """Shard each layer and the rest with FSDP2; one rank takes the same path as many.

    Where nothing is gathered layer by layer, all parameters are one group: fewer calls, the same values.
    """
    policy = lay_out(model, config, world.device)
    dtypes = mixed_precision(config)
    if world.size > 1:
        for layer in _layers(model):
            fully_shard(layer, mesh=world.mesh, mp_policy=dtypes, reshard_after_forward=world.is_sharded)
    fully_shard(policy, mesh=world.mesh, mp_policy=dtypes, reshard_after_forward=False)
    return policy


def lay_out(model: PreTrainedModel, config: TrainerConfig, device: torch.device) -> Policy:
    """Bring a model to its device, and checkpoint and compile its layers."""
    model.to(device)  # pyright: ignore[reportArgumentType]
    if config.activation_checkpointing == "attention" and model.config._attn_implementation == FLEX:
        LOGGER.warning("FlexAttention is computed again like everything else: its result cannot be kept")
    if config.compile:
        _settle_compiler()
    for layer in _layers(model):
        forward: Any = layer.forward
        if config.activation_checkpointing == "attention":
            forward = functools.partial(checkpoint, forward, use_reentrant=False, context_fn=_keep_attention)
        if config.compile:
            forward = torch.compile(forward, dynamic=False)
        if config.activation_checkpointing == "full":
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        layer.forward = forward
    return Policy(model, keeps_logits=config.activation_checkpointing == "none")


def mixed_precision(config: TrainerConfig) -> MixedPrecisionPolicy:
    """bf16: the passes run on a copy in bf16, as the sampler does; weights, sums of gradients, optimizer in fp32."""
    if config.precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _keep_attention() -> Any:
    """All operations of a layer are computed again in the backward pass but attention, most of a long row's work."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = getattr(getattr(operation, "overloadpacket", operation), "__name__", "")
    return CheckpointPolicy.MUST_SAVE if name in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def _layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The decoder layers, by the name that the model gives their class."""
    names = set(model._no_split_modules or [])
    yield from (module for module in model.modules() if type(module).__name__ in names)


def _settle_compiler() -> None:
    """What is computed may depend on the shape alone: not on what was compiled before, nor on timings."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    dynamo.recompile_limit = SHAPES_AT_MOST
    dynamo.fail_on_recompile_limit_hit = True  # the alternative is to go on without compilation, unsaid
    inductor.compile_threads = 1  # no processes of its own, which could outlive the run
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True  # kernels are not chosen by how fast they were
