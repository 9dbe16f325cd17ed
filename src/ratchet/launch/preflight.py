"""What is worth saying before a run starts: will its checkpoints fit on the disk, its policies into the memory?"""

import json
import math
import os
import shutil
import struct
from pathlib import Path

from ratchet.config import RLConfig, RunConfig
from ratchet.errors import Refusal
from ratchet.launch.trials import IN_MEMORY, mount_type

# fp32 weights, and AdamW's two moments; Muon keeps one.
_CHECKPOINT_BYTES = 12
_POLICY_BYTES = 4


def count_parameters(directory: Path) -> int | None:
    """Parameters of a saved model, from the headers of its files; None where there is none to read.

    Source: the safetensors format: 8 bytes of length, then JSON with the shape of every tensor
    """
    total = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total or None


def bytes_needed(config: RunConfig, parameters: int) -> tuple[int, int]:
    """How many checkpoints the settings keep at once, and the bytes of all that a run of that size holds on disk."""
    ckpt, kept = config.ckpt, 0
    if ckpt is not None:
        saves = 1 if ckpt.interval is None else -(-config.max_steps // ckpt.interval)
        kept = saves if ckpt.keep_last is None else min(saves, ckpt.keep_last + 1)
    checkpoint_bytes = 0 if config.model.lora else _CHECKPOINT_BYTES  # adapters alone are next to nothing
    return kept, parameters * (kept * (checkpoint_bytes + _POLICY_BYTES) + 2 * _POLICY_BYTES)


def check_memory(config: RLConfig) -> None:
    """Raises: Refusal if policies are to go through memory, and there is no room, or no memory, where that is said."""
    if config.weights.transport != "memory":
        return
    base, instead = config.weights.memory_dir, "or set weights.transport = 'filesystem'."
    if not base.is_dir() or not os.access(base, os.W_OK | os.X_OK):
        raise Refusal(
            f"weights.memory_dir {base} is no directory that can be written: choose another, {instead}"
        )
    if (kind := mount_type(base.resolve())) not in IN_MEMORY:
        raise Refusal(f"weights.memory_dir {base} is on {kind}, not on a tmpfs: choose another, {instead}")
    model = Path(config.model.name)
    parameters = count_parameters(model) if model.is_dir() else None
    # Those that sample or are read, the one that is written, and the one whose pages are kept for it.
    count = config.max_async_level + 3
    needed = (parameters or 0) * _POLICY_BYTES * count
    free = min(shutil.disk_usage(base).free, available_bytes())
    if needed > free:
        raise Refusal(
            f"{count} policies in memory need about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free at "
            f"{base}: enlarge it (mount -o remount,size=...), {instead}"
        )


def available_bytes() -> int:
    """Source: proc(5), /proc/meminfo"""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def disk_warning(config: RunConfig, free_bytes: int | None = None) -> str | None:
    """A sentence if the checkpoints that the settings keep will not fit; None if they will, or nobody knows."""
    parameters = count_parameters(Path(config.model.name)) if Path(config.model.name).is_dir() else None
    if parameters is None or config.ckpt is None:
        return None
    kept, needed = bytes_needed(config, parameters)
    free = shutil.disk_usage(config.output_dir).free if free_bytes is None else free_bytes
    if needed <= free:
        return None
    return (
        f"{kept} checkpoints of {parameters / 1e6:,.0f} M parameters need about {needed / 1e9:,.1f} GB, and "
        f"{free / 1e9:,.1f} GB are free at {config.output_dir}: lower --ckpt.keep-last, or make room."
    )
