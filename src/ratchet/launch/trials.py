"""What the doctor finds out about a file system: `filesystem.check`, and what only a diagnosis has the time for.

Each trial works in a directory of its own, below the one in question, which is removed afterwards. A trial raises
`_Broken` for a promise that was not kept; an error of the operating system counts as one.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ratchet import process
from ratchet.durable import fsync_path
from ratchet.launch import filesystem
from ratchet.launch.finding import Finding

_VISIBLE_S = 5.0
_SYNCS = 10
_SLOW_SYNC_S = 0.1
_SPEED_BYTES = 32 << 20
_ELSEWHERE = "choose an --output-dir on a local disk, or on a shared file system with POSIX semantics"
IN_MEMORY = {"tmpfs", "ramfs"}
_SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "virtiofs"}


class _Broken(Exception):
    """What this file system did, and what it would do to a run."""


def examine(directory: Path) -> list[Finding]:
    """Try every promise where a run in `directory` would write; its nearest parent stands for one that is not there."""
    place = standing(directory)
    found = [_kind(place)]
    try:
        root = Path(tempfile.mkdtemp(prefix=".ratchet-doctor-", dir=place))
    except OSError as error:
        text = f"{place} cannot be written ({process.reason(error)})"
        return [
            *found,
            Finding("directory", "fails", text, "make it writable, or choose another --output-dir"),
        ]
    try:
        found += _promises(root)
        found += [_try(name, trial, root, kept) for name, trial, kept in _TRIALS]
        found.append(_speed(root))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return found


def standing(directory: Path) -> Path:
    """The directory itself, or the nearest parent that exists."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.exists())


def _promises(root: Path) -> list[Finding]:
    """What every launcher may require; a name that another process does not see soon is waited for briefly."""
    wrong = filesystem.check(root, visible_s=_VISIBLE_S)
    if wrong:
        said = (sentence.replace(str(root), str(root.parent)).rstrip(".") for sentence in wrong)
        return [Finding("promises", "fails", sentence) for sentence in said]
    kept = "renames, syncs and locks hold, and another process sees them"
    return [Finding("promises", "ok", kept)]


def _try(name: str, trial: Callable[[Path], None], root: Path, kept: str) -> Finding:
    room = root / name
    try:
        room.mkdir()
        trial(room)
    except _Broken as broken:
        return Finding(name, "fails", str(broken), _ELSEWHERE)
    except OSError as error:
        return Finding(name, "fails", f"the file system refuses it ({process.reason(error)})", _ELSEWHERE)
    return Finding(name, "ok", kept)


def _fence(room: Path) -> None:
    workshop = room / "workshop"
    workshop.mkdir()
    log = room / "log"
    log.write_bytes(b"")
    os.rename(workshop, room / "revoked")
    try:
        (workshop / ".." / "log").open("ab").close()
        (workshop / "late").write_bytes(b"x")
    except FileNotFoundError:
        return
    raise _Broken("a directory that was renamed away can still be written into: a dead process could publish")


def _append(room: Path) -> None:
    path = room / "log"
    ways = [os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) for _ in range(2)]
    try:
        for number in range(8):
            os.write(ways[number % 2], bytes([number]) * 100)
    finally:
        for way in ways:
            os.close(way)
    if path.read_bytes() != b"".join(bytes([number]) * 100 for number in range(8)):
        raise _Broken("O_APPEND does not append: lines of the journal could overwrite each other")


_TRIALS: tuple[tuple[str, Callable[[Path], None], str], ...] = (
    ("fence", _fence, "a directory that was renamed away cannot be written into"),
    ("append", _append, "two writers of a log do not overwrite each other"),
)


def _speed(root: Path) -> Finding:
    """Every commit waits for a few syncs, every save for its bytes."""
    name, waits = "fsync", []
    try:
        for number in range(_SYNCS):
            path = root / f"small{number}"
            path.write_bytes(b"x" * 4096)
            began = time.perf_counter()
            fsync_path(path)
            fsync_path(root)
            waits.append(time.perf_counter() - began)
        path = root / "large"
        block = os.urandom(_SPEED_BYTES)
        began = time.perf_counter()
        path.write_bytes(block)
        fsync_path(path)
        rate = _SPEED_BYTES / (time.perf_counter() - began)
    except OSError as error:
        return Finding(name, "fails", f"the file system refuses it ({process.reason(error)})", _ELSEWHERE)
    wait = statistics.median(waits)
    text = f"{wait * 1e3:.1f} ms for a small file and its directory, {rate / 1e6:,.0f} MB/s"
    if wait <= _SLOW_SYNC_S:
        return Finding(name, "ok", text)
    return Finding(name, "warning", f"{text}: each step waits for several of these", "a faster disk")


def _kind(place: Path) -> Finding:
    kind, name = mount_type(place), "directory"
    text = f"{place} ({kind})"
    if kind in IN_MEMORY:
        return Finding(
            name, "warning", f"{text} is kept in memory: a restart of the machine ends it", _ELSEWHERE
        )
    if kind == "overlay":
        return Finding(
            name,
            "warning",
            f"{text} belongs to a container and goes with it",
            "an --output-dir on a mounted volume, if the run must outlive the container",
        )
    if kind in _SHARED or kind.startswith("fuse"):
        return Finding(
            name,
            "warning",
            f"{text} is not a local disk: what follows was tried from this machine only",
            "start one launcher a run, on one machine",
        )
    return Finding(name, "ok", text)


def mount_type(place: Path, table: str | None = None) -> str:
    """The type of the file system that holds a directory. Source: proc(5), /proc/mounts"""
    text = Path("/proc/mounts").read_text() if table is None else table
    best, kind = -1, "unknown"
    for line in text.splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if (
            place.is_relative_to(point) and len(point) >= best
        ):  # of two mounts at one point the later one counts
            best, kind = len(point), found
    return kind
