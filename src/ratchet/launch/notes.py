"""What the launchers of several nodes tell each other about one incarnation of the trainer: files in its workshop.

    node.<i>    node i has started its ranks here; at most once, so that no rank is there twice
    lost.<i>    those ranks have ended with this exit code
    stop.<i>    node i was asked to stop; node 0 stops all

A note in a workshop that was renamed away is lost, and should be: it is about an incarnation that has ended.
"""

import os
from pathlib import Path

_TAKEN, _LOST, _STOP = "node", "lost", "stop"


def take(workshop: Path, node: int) -> bool:
    """Claim the place of a node; False if it was taken before. Raises: FileNotFoundError if the workshop is gone."""
    try:
        (workshop / f"{_TAKEN}.{node}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def report(workshop: Path, node: int, code: int) -> None:
    """Say that the ranks of a node have failed: the incarnation is over."""
    _leave(workshop / f"{_LOST}.{node}", str(code))


def ask_to_stop(workshop: Path, node: int) -> None:
    _leave(workshop / f"{_STOP}.{node}", "")


def _leave(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except FileNotFoundError:
        pass  # the incarnation has ended already


def failures(workshop: Path) -> list[int]:
    """The exit codes of the nodes that have reported one."""
    found = []
    for name in _names(workshop, _LOST):
        text = (workshop / name).read_text() if (workshop / name).exists() else ""
        if text:  # empty while it is being written
            found.append(int(text))
    return found


def is_asked_to_stop(workshop: Path) -> bool:
    return bool(_names(workshop, _STOP))


def _names(workshop: Path, kind: str) -> list[str]:
    try:
        return [name for name in os.listdir(workshop) if name.startswith(f"{kind}.")]
    except FileNotFoundError:
        return []
