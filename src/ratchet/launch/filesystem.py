"""Does a file system keep what a run relies on? Tried out with a second process, in a directory of its own.

rename       atomic replacement of a file; a directory never replaces one that is not empty
fsync        of a file and of a directory
flock        one process at a time
visibility   a name that one process makes or moves is there for another within VISIBLE_S
free space   for what the settings keep
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ratchet import durable, process
from ratchet.errors import Refusal

VISIBLE_S = 30.0
POLL_S = 0.02
MIN_FREE_BYTES = 64 << 20

# What the second process does: one word a line from us, one word a line back.
_OTHER = """
import fcntl, os, sys, time
folder, patience = sys.argv[1], float(sys.argv[2])
def seen(name):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if name in os.listdir(folder) and os.path.exists(os.path.join(folder, name)): return "yes"
        time.sleep(0.02)
    return "no"
def locked(name):
    with open(os.path.join(folder, name)) as file:
        try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError: return "no"
        return "yes"
def move(pair):
    os.rename(*(os.path.join(folder, name) for name in pair.split(":")))
    return "yes"
for line in sys.stdin:
    word, _, name = line.strip().partition(" ")
    print({"seen": seen, "locked": locked, "move": move}[word](name), flush=True)
"""


def check(directory: Path, *, visible_s: float = VISIBLE_S, needed_bytes: int = MIN_FREE_BYTES) -> list[str]:
    """One sentence with its remedy for each thing that `directory`'s file system does not keep; empty if all is well.

    Waits for: names to become visible, `visible_s` at most for each.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".preflight-", dir=directory))
    except OSError as error:
        return [f"{directory} cannot be written ({process.reason(error)}): choose another --output-dir."]
    try:
        found = [_rename(folder), _fsync(folder), _free_space(directory, needed_bytes)]
        if found[0] is None:
            found += _with_another(folder, visible_s)
        return [sentence.format(directory=directory) for sentence in found if sentence is not None]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require(directory: Path) -> None:
    """Raises: Refusal with everything that is wrong."""
    if found := check(directory):
        raise Refusal(" ".join(found))


def _rename(folder: Path) -> str | None:
    remedy = (
        "use a POSIX file system (NFSv4, Lustre, GPFS, a local disk), not an object store that is mounted."
    )
    try:
        for name in ("old", "new", "full/x", "empty/.x"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        os.rename(folder / "new", folder / "old")
        if (folder / "old").read_text() != "new":
            return f"A rename in {{directory}} does not replace a file: {remedy}"
    except OSError as error:
        return f"A rename in {{directory}} fails ({error.strerror}): {remedy}"
    try:
        os.rename(folder / "full", folder / "empty")
    except OSError:
        return None
    return f"A rename in {{directory}} replaces a directory that is not empty: {remedy}"


def _fsync(folder: Path) -> str | None:
    try:
        path = folder / "synced"
        path.write_text("x")
        durable.fsync_path(path)
        durable.fsync_path(folder)
    except OSError as error:
        return (
            f"fsync in {{directory}} fails ({error.strerror}), so nothing there is certain to survive a power cut: "
            "use another file system for --output-dir."
        )
    return None


def _free_space(directory: Path, needed_bytes: int) -> str | None:
    free = shutil.disk_usage(directory).free
    if free >= needed_bytes:
        return None
    return (
        f"{free / 1e9:,.1f} GB are free at {{directory}} and {needed_bytes / 1e9:,.1f} GB are needed: make room, or "
        "choose another --output-dir."
    )


def _with_another(folder: Path, visible_s: float) -> list[str | None]:
    """What takes two processes to find out."""
    other = subprocess.Popen(
        [sys.executable, "-c", _OTHER, str(folder), str(visible_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def ask(what: str) -> bool:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(f"{what}\n")
        other.stdin.flush()
        return other.stdout.readline() == "yes\n"

    try:
        return [_flock(folder, ask), _visibility(folder, ask, visible_s)]
    finally:
        other.kill()
        other.communicate()


def _flock(folder: Path, ask: Callable[[str], bool]) -> str | None:
    path = folder / "lock"
    remedy = "mount it with lock support (NFS: without `nolock`), or two launchers could write one run."
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"A lock in {{directory}} cannot be taken ({error.strerror}): {remedy}"
        if ask("locked lock"):
            return f"A lock in {{directory}} does not keep another process out: {remedy}"
    return (
        None
        if ask("locked lock")
        else f"A lock in {{directory}} is not free after its holder let go: {remedy}"
    )


def _visibility(folder: Path, ask: Callable[[str], bool], visible_s: float) -> str | None:
    (folder / "made").write_text("x")
    if ask("seen made") and ask("move made:moved") and appears(folder / "moved", visible_s):
        return None
    return (
        f"A name made in {{directory}} by one process is not seen by another within {visible_s:g} s: lower the "
        "attribute cache of the mount (NFS: actimeo, lookupcache=positive), or use another file system."
    )


def appears(path: Path, timeout_s: float) -> bool:
    """Whether a name is there within so many seconds; its directory is read first, which outdates cached answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        if path.parent.is_dir() and path.name in os.listdir(path.parent) and path.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
