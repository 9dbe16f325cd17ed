"""Whether a vLLM that a user runs can serve a run: which of its arguments are missing.

Nothing here talks to a server: `check.probe` asks, and this reads the answers.
"""

from typing import Any

import msgspec

BACKEND, LOGPROBS = "ratchet", "processed_logprobs"
OLDEST = (0, 32)


class Vllm(msgspec.Struct, frozen=True):
    """What a vLLM with our middleware says about itself in /weight_info."""

    engine: str
    weight_transfer: str | None = None
    logprobs_mode: str = ""
    sampling_defaults: dict[str, Any] = {}
    scale_out: bool = False


class _Version(msgspec.Struct):
    version: str


def misfit(weight_info: bytes | None, version: bytes | None) -> str | None:
    """Why a server cannot serve a run, with the remedy; None if it can, or if it is no vLLM.

    Takes the bodies of GET /weight_info and GET /version, None where there was no answer.
    """
    found = _decode(version, _Version)
    if found is None:
        return None  # the embedded engine does not say so
    if _number(found.version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"is vLLM {found.version}: {oldest} is the first that tells the weights of each token; use it."
    # One that says nothing about itself has no middleware of ours: what else it has, nobody knows.
    lacking = _lacking(_decode(weight_info, Vllm) or Vllm(engine=""))
    if not lacking:
        return None
    return f"is vLLM {found.version} without {' '.join(lacking)}: start it with that (docs/scaling.md)."


def _lacking(vllm: Vllm) -> list[str]:
    """The arguments that are missing, as one types them."""
    lacking = []
    if not vllm.engine:
        lacking.append("--middleware ratchet.inference.vllm.front.Front")
    if not vllm.scale_out:
        lacking.append("--enable-scale-out")
    if vllm.weight_transfer != BACKEND:
        lacking.append(f'--weight-transfer-config \'{{"backend": "{BACKEND}"}}\'')
    if vllm.logprobs_mode != LOGPROBS:
        lacking.append(f"--logprobs-mode {LOGPROBS}")
    if vllm.sampling_defaults or not vllm.engine:
        lacking.append("--generation-config vllm")
    return lacking


def _decode(data: bytes | None, shape: type[Any]) -> Any:
    try:
        return None if data is None else msgspec.json.decode(data, type=shape)
    except msgspec.DecodeError:
        return None


def _number(version: str) -> tuple[int, ...]:
    """The first two numbers of a version; a build from source that names none counts as new."""
    parts = version.split(".")[:2]
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else OLDEST
