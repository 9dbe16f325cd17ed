"""What the programs of a run have computed on: one small file for each program of each attempt. Needs no torch."""

import shutil
from pathlib import Path

import msgspec

from ratchet import attempts
from ratchet.log import LOGGER
from ratchet.paths import DEVICE, RunPaths


class Device(msgspec.Struct, frozen=True):
    """A kind of device and its model."""

    type: str
    """As torch calls it: cuda or cpu."""
    name: str
    """The model of the GPU or the processor."""

    def __str__(self) -> str:
        return f"{self.type} ({self.name})"


def newest(paths: RunPaths, role: str, since: int) -> Device | None:
    """What a program of this role last computed on, in attempt `since` or a later one: any of several servers."""
    for number in reversed(attempts.numbers(paths)):
        if number < since:
            break
        for path in sorted(paths.attempt(number).glob(f"{role}*/{DEVICE}")):
            if (found := _read(path)) is not None:
                return found
    return None


def _read(path: Path) -> Device | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Device)
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, msgspec.MsgspecError) as error:
        LOGGER.warning("%s cannot be read (%s): it does not count", path, error)
        return None


def copy(source: Path, target: Path) -> None:
    """The notes of one attempt's directory, into another's."""
    for path in sorted(source.glob(f"*/{DEVICE}")):
        (target / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.parent.name / DEVICE)
