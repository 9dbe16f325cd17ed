"""The device that a program computes on: named in its log, and kept to for as long as its run lasts.

A GPU does not give the bits of a CPU. So a run that has computed on one does not go on on the other because a driver
failed for a moment, or a machine was another one: only a configuration that names the device moves it.
"""

import os

import msgspec
import torch

from ratchet import device_notes, hardware
from ratchet.attempts import Assignment
from ratchet.device_notes import Device
from ratchet.errors import RatchetError
from ratchet.log import LOGGER


def choose(wanted: str) -> torch.device:
    """`auto` takes a GPU where torch finds one: of several the one of this rank."""
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if wanted == "auto" and hardware.gpus() and not is_hidden:
        LOGGER.warning("there is a GPU, but torch cannot use it (%s): computing on the CPU", _why_not())
    return torch.device("cpu")


def _why_not() -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # of many kinds: no build for it, no driver, an old one
        return str(error).partition("\n")[0]
    return "it found none"


def describe(device: torch.device) -> Device:
    if device.type == "cuda":
        return Device("cuda", torch.cuda.get_device_name(device))
    return Device(device.type, hardware.processor())


def choose_for(assignment: Assignment, name: str, wanted: str) -> torch.device:
    """The device of the run's program `name`: where it is `auto`, what its role has computed on before.

    What attempts before this one computed on does not count where nothing of it is left.
    Raises: RatchetError where that was a GPU and torch finds none: it is started again, as after a crash
    """
    role = name.partition("_")[0]
    plan = assignment.plan
    begins = plan.step == 0 and plan.next_batch == 0 and not plan.from_checkpoint
    before = device_notes.newest(assignment.paths, role, since=assignment.attempt if begins else 0)
    if before is None or wanted != "auto":
        chosen = choose(wanted)
        if before is not None and before.type != chosen.type:
            LOGGER.warning("computing on %s from here on, on %s before: other bits", describe(chosen), before)
        return chosen
    chosen = choose("auto" if before.type == "cuda" else "cpu")
    if chosen.type != before.type:
        raise RatchetError(
            f"The {role} of this run has computed on {before}, and torch finds no GPU ({_why_not()}). Start it where "
            f"there is one, or go on with other bits by --{role}.device cpu and --ckpt.resume-step -1."
        )
    return chosen


def note(assignment: Assignment, name: str, device: torch.device) -> None:
    """Keep what a program computes on, before it does. Crash: the next start notes it again."""
    here = describe(device)
    LOGGER.info("computing on %s", here)
    path = assignment.paths.device(assignment.attempt, name)
    path.parent.mkdir(exist_ok=True)
    assignment.stage.replace(path, msgspec.json.encode(here))
