"""What this machine computes with, as the operating system tells it: needs no torch, and opens no GPU."""

import platform
from pathlib import Path

GPUS = Path("/proc/driver/nvidia/gpus")
_PROCESSORS = Path("/proc/cpuinfo")


def processor() -> str:
    """The model of the processor; its architecture where the kernel does not say more."""
    try:
        lines = _PROCESSORS.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def gpus() -> list[str]:
    """The model of each NVIDIA GPU that the driver knows, in its order."""
    try:
        return [_model(directory / "information") for directory in sorted(GPUS.iterdir())]
    except OSError:
        return []


def _model(information: Path) -> str:
    try:
        lines = information.read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), "unknown")
