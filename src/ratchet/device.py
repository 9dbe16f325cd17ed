"""The device that a program computes on: chosen once, named in its log, and kept to for as long as its run lasts.

A GPU does not give the bits of a CPU. So a run that began on one does not go on on the other because a driver failed
for a moment, or a machine was another one: only a configuration that names the device moves it.
"""

import os

import msgspec
import torch

from ratchet import attempts, hardware
from ratchet.attempts import Assignment
from ratchet.errors import RatchetError, Refusal
from ratchet.log import LOGGER


class Held(msgspec.Struct, frozen=True):
    """What a program of an attempt computes on."""

    type: str
    """As torch calls it: cuda or cpu."""
    name: str
    """The model of the GPU or the processor."""

    def __str__(self) -> str:
        return f"{self.type} ({self.name})"


def choose(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` takes a GPU where torch finds one."""
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank)
    if wanted == "auto" and hardware.gpus() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        LOGGER.warning("there is a GPU, but torch cannot use it (%s): computing on the CPU", _why_not())
    return torch.device("cpu")


def _why_not() -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # of many kinds: no build for it, no driver, an old one
        return str(error).partition("\n")[0]
    return "it found none"


def describe(device: torch.device) -> Held:
    if device.type == "cuda":
        return Held("cuda", torch.cuda.get_device_name(device))
    return Held(device.type, hardware.processor())


def hold(
    assignment: Assignment, role: str, wanted: str, device: torch.device, *, writes: bool = True
) -> None:
    """Note what `role` computes on, unless it would leave the device of its run unasked.

    Raises: RatchetError, so that it is started again, where a GPU is gone; Refusal where one has come
    """
    here, before = describe(device), _held_before(assignment, role)
    if before is not None and before.type != here.type and wanted == "auto":
        raise _unasked(role, before, here)
    if before is not None and before != here:
        LOGGER.warning(
            "computing on %s from here on, on %s before: results are not the same bits", here, before
        )
    if writes:
        LOGGER.info("computing on %s", here)
        path = assignment.paths.device(assignment.attempt, role)
        if before != here or not path.exists():
            path.parent.mkdir(exist_ok=True)
            assignment.stage.replace(path, msgspec.json.encode(here))


def _held_before(assignment: Assignment, role: str) -> Held | None:
    """The newest note of this role, of this attempt or one before."""
    for number in sorted(attempts.numbers(assignment.paths), reverse=True):
        try:
            return msgspec.json.decode(assignment.paths.device(number, role).read_bytes(), type=Held)
        except (FileNotFoundError, msgspec.DecodeError):  # it says nothing that a start could depend on
            continue
    return None


def _unasked(role: str, before: Held, here: Held) -> RatchetError:
    moved = f"{role} of this run has computed on {before}, and would go on on {here}"
    setting = f"{'trainer' if role == 'trainer' else 'inference'}.device"
    if here.type == "cpu":
        return RatchetError(
            f"The {moved}, because torch finds no GPU ({_why_not()}). Start it where there is one, or set "
            f'{setting} = "cpu": its results are then other bits.'
        )
    return Refusal(
        f'The {moved}: set {setting} = "{before.type}" to go on as before, or "{here.type}" to move it.'
    )
