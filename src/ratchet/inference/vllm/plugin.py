"""What vLLM loads in each of its processes, by the entry point `vllm.general_plugins`.

It registers the weight-transfer backend `ratchet`, for `--weight-transfer-config '{"backend": "ratchet"}'`. In a
server of ours it also makes every process die with the one that started it: vLLM's own do not when it is killed.
"""

import multiprocessing
import os

from ratchet import process

BACKEND = "ratchet"
OWNED = "RATCHET_VLLM_OWNED"
"""Set in the environment of a vLLM that `inference` started."""


def register() -> None:
    """Called by vLLM, perhaps more than once in a process."""
    from vllm.distributed.weight_transfer import (  # pyright: ignore[reportMissingImports]
        WeightTransferEngineFactory,
    )

    try:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "ratchet.inference.vllm.transfer", "PublishedWeights"
        )
    except ValueError:
        return  # it is there already
    if OWNED in os.environ:
        _die_with_parent()
        os.register_at_fork(after_in_child=_die_with_parent)


def _die_with_parent() -> None:
    """For the children that vLLM forks; its first process and those it spawns are told by `serve`."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        process.die_with(parent.pid)
