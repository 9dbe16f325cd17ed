"""What of this machine could keep a run from working: interpreter, packages, devices, port, memory, disk."""

import importlib.util
import platform
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import msgspec
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ratchet import hub, process
from ratchet import memory as shared_memory
from ratchet.config import RLConfig, RunConfig, SFTConfig, WeightsConfig
from ratchet.launch.finding import Finding
from ratchet.launch.preflight import available_bytes, bytes_needed
from ratchet.launch.trials import standing

_INSTALL = "install Ratchet again: `uv sync` in its clone"
# fp32 weights, their gradients, and AdamW's two moments.
_STATE_BYTES = 16
_FROZEN_BYTES = 4


class Gpu(msgspec.Struct, frozen=True):
    name: str
    memory_bytes: int


class Torch(msgspec.Struct, frozen=True):
    """What `ratchet.models.probe` says."""

    cuda_build: str | None
    gpus: list[Gpu]
    parameters: int | None


def python() -> Finding:
    wanted = metadata.metadata("ratchet")["Requires-Python"]
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        why = "programs that die with their launcher need Linux"
        return Finding("python", "fails", f"{text}: {why}", "use Linux, or WSL 2")
    if platform.python_version() not in SpecifierSet(wanted, prereleases=True):
        remedy = f"use one of {wanted}: `uv python pin 3.12`"
        return Finding("python", "fails", f"{text} is not supported", remedy)
    return Finding("python", "ok", text)


def packages() -> Finding:
    """Everything that Ratchet itself depends on, in the versions that it supports."""
    own = [Requirement(line) for line in metadata.requires("ratchet") or []]
    needed = [r for r in own if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [sentence for requirement in needed if (sentence := _misfit(requirement))]
    if wrong:
        return Finding("packages", "fails", "; ".join(wrong), _INSTALL)
    named = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return Finding("packages", "ok", f"{named}, and {len(needed) - 2} others fit")


def byte_code() -> Finding | None:
    """A warning where every start of a program compiles torch and transformers anew."""
    spec = importlib.util.find_spec("torch")
    if not sys.dont_write_bytecode or spec is None or spec.cached is None or Path(spec.cached).exists():
        return None
    return Finding(
        "byte code",
        "warning",
        "torch has none, and PYTHONDONTWRITEBYTECODE is set: every start of a program compiles it for seconds",
        "`uv sync --compile-bytecode`, or unset the variable",
    )


def _misfit(requirement: Requirement) -> str | None:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} is {found}, supported is {requirement.specifier}"


def probe(config: RunConfig | None) -> Torch | str:
    """What torch sees, or why it sees nothing. The model is counted where its files are on this machine."""
    model = [config.model.name] if config and Path(config.model.name, "config.json").is_file() else []
    command = [sys.executable, "-m", "ratchet.models.probe", *model]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    try:
        return msgspec.json.decode(done.stdout.splitlines()[-1] if done.stdout else "", type=Torch)
    except msgspec.MsgspecError:
        said = done.stderr.strip().splitlines()
        return said[-1] if said else f"exit code {done.returncode}"


def devices(found: Torch | str, config: RunConfig | None) -> Finding:
    if isinstance(found, str):
        return Finding("torch", "fails", f"cannot be used: {found}", _INSTALL)
    cards = [f"{gpu.name} ({size(gpu.memory_bytes)})" for gpu in found.gpus]
    text = ", ".join(cards) or "no GPU: everything runs on the CPU"
    if not isinstance(config, SFTConfig | RLConfig):
        return Finding("torch", "ok", text)
    trainer = config.trainer
    if trainer.device == "cuda" and not cards:
        why = "built without CUDA" if found.cuda_build is None else f"its CUDA {found.cuda_build} finds none"
        remedy = 'set trainer.device = "auto", or look at the driver with nvidia-smi'
        return Finding("torch", "fails", f'trainer.device is "cuda", and torch sees no GPU ({why})', remedy)
    if cards and trainer.device != "cpu" and trainer.nproc > len(cards):
        text = f"trainer.nproc is {trainer.nproc}, and torch sees {len(cards)} GPUs"
        return Finding("torch", "fails", text, f"set trainer.nproc to {len(cards)} or less")
    return Finding("torch", "ok", text)


def port() -> Finding:
    """A run that starts its own server takes a free loopback port and talks to it."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            number = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", number), timeout=5):
                return Finding("port", "ok", "a free loopback port can be had and reached")
    except OSError as error:
        text = f"no loopback port can be had and reached ({process.reason(error)})"
        return Finding("port", "fails", text, "bring the loopback interface up: `ip link set lo up`")


def memory(found: Torch | str, config: RunConfig | None) -> Finding | None:
    """Weights, gradients and optimizer alone; activations and the inference engine come on top."""
    if isinstance(found, str) or not found.parameters or not isinstance(config, SFTConfig | RLConfig):
        return None
    state_bytes = _FROZEN_BYTES if config.model.lora else _STATE_BYTES
    needed = found.parameters * state_bytes * config.trainer.parallel.replicate // config.trainer.ranks
    on_gpu = bool(found.gpus) and config.trainer.device != "cpu"
    there = min(gpu.memory_bytes for gpu in found.gpus) if on_gpu else available_bytes()
    text = (
        f"{found.parameters / 1e6:,.1f} M parameters take {size(needed)} in each trainer process "
        f"before activations; {size(there)} are there"
    )
    if needed <= there:
        return Finding("memory", "ok", text)
    return Finding("memory", "warning", text, "raise trainer.nproc, or take a smaller model")


def leftovers(config: RunConfig | None) -> Finding | None:
    """Policies in memory of runs whose launcher was killed, and which nobody has continued here."""
    base = config.weights.memory_dir if isinstance(config, RLConfig) else WeightsConfig().memory_dir
    found = [str(root) for root in shared_memory.leftovers(base)]
    if not found:
        return None
    text = f"{', '.join(found)}: policies of runs that are gone take memory"
    return Finding("leftovers", "warning", text, f"rm -r {' '.join(found)}")


def disk(found: Torch | str, config: RunConfig | None, directory: Path) -> Finding:
    place = standing(directory)
    free = shutil.disk_usage(place).free
    text = f"{size(free)} are free at {place}"
    if config is None or isinstance(found, str) or not found.parameters:
        return Finding(
            "disk", "ok", text if config is None else f"{text}; how large the model is is not known here"
        )
    kept, needed = bytes_needed(config, found.parameters)
    text = f"{kept} checkpoints and the weights need about {size(needed)}; {text}"
    if needed <= free:
        return Finding("disk", "ok", text)
    return Finding("disk", "fails", text, "lower --ckpt.keep-last, or make room")


def size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"


def model(config: RunConfig) -> Finding | None:
    """A name of the hub is looked up when the run starts, not here."""
    if hub.is_local(config.model.name):
        return None
    text = f"{config.model.name} is a hub name: it is downloaded when the run starts, or taken from the cache"
    return Finding("model", "warning", text, "give a directory where there is no network")
