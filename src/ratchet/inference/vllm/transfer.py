"""The weight-transfer backend: a published weights directory into a model that vLLM serves.

Everything is verified, read and matched before the model is touched; then vLLM's own loader, layer by layer, puts
the values where its kernels read them.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import WeightTransferEngine  # pyright: ignore
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm  # pyright: ignore
from vllm.model_executor.model_loader.reload import (  # pyright: ignore
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform  # pyright: ignore

from ratchet.errors import RatchetError
from ratchet.inference import adoption
from ratchet.models import naming

_CARRIED = re.compile(r"<ratchet (\w+)>(.*?)</ratchet>", re.DOTALL)


class Carried(ValueError):
    """A refusal on its way out of a worker process: vLLM passes the text on, and not the type."""

    def __init__(self, error: RatchetError) -> None:
        super().__init__(f"<ratchet {type(error).__name__}>{error}</ratchet>")


def carried(message: str) -> tuple[str, str] | None:
    """The type and the sentence of a refusal that a worker raised, if that is what happened."""
    found = _CARRIED.search(message)
    return None if found is None else (found[1], found[2])


@dataclass
class Nothing:
    """What it takes to set this backend up."""


@dataclass
class Directory:
    """One update."""

    path: str = field(default="")
    """The one directory that an older client names."""
    paths: list[str] = field(default_factory=list)
    """The directories that hold the policy, the best first."""
    digest: str = ""
    """Of the policy; empty if that which stands there is meant."""

    @property
    def wanted(self) -> adoption.Wanted:
        return adoption.Wanted(tuple(self.paths or [self.path]), self.digest or None, bool(self.paths))


class PublishedWeights(WeightTransferEngine):
    """Loads `weights/step_N`: the manifest is verified, the network compared, every tensor accounted for."""

    init_info_cls = Nothing
    update_info_cls = Directory

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        served = AutoConfig.from_pretrained(vllm_config.model_config.model)
        self._architecture = adoption.architecture(served)
        with torch.device("meta"):
            self._shape = AutoModelForCausalLM.from_config(served)

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Nothing to set up: the weights lie in a directory."""

    def start_weight_update(self) -> None:
        """Nothing yet: the model is touched when the new weights are known to be whole."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one directory. Raises: Carried, before anything changes."""
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    @torch.no_grad()
    def receive_weights(self, update_info: Directory) -> None:
        try:
            _, tensors = update_info.wanted.read(self._architecture)
            adoption.match(self._shape, naming.inward(self._shape, tensors))
        except RatchetError as error:
            raise Carried(error) from None
        initialize_layerwise_reload(self.model)
        self.model.load_weights(iter(tensors.items()))
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            _repack_tied_head(self.model)

    def finish_weight_update(self) -> None:
        """Nothing left: what was received is in use."""

    def shutdown(self) -> None:
        """Nothing is held."""


def _repack_tied_head(model: Any) -> None:
    """On a CPU the output layer computes with a packed copy, which of tied weights no loader ever renews."""
    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    if head is None or embedding is None or not model.config.tie_word_embeddings:
        return
    head.weight = embedding.weight
    dispatch_cpu_unquantized_gemm(head, remove_weight=False)
