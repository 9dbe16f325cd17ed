"""Which GPUs each inference server of a run sees. Without torch: the launcher holds no GPU."""

import os
from collections.abc import Mapping, Sequence

from ratchet import hardware
from ratchet.config import InferenceConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"


def environment(settings: InferenceConfig, replica: int) -> Mapping[str, str]:
    """What a replica's environment adds: its GPUs. Nothing for a single server that is not told which, or on a CPU."""
    if settings.devices:
        return {VISIBLE: settings.devices[replica % len(settings.devices)]}
    if settings.replicas == 1 or settings.device == "cpu":
        return {}
    there = visible()
    return {VISIBLE: there[replica % len(there)]} if there else {}


def visible() -> Sequence[str]:
    """The GPUs that this process may use, as CUDA counts them."""
    if (given := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [str(number) for number in range(len(hardware.gpus()))]
