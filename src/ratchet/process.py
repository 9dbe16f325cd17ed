"""What every program of a run does at its start and at its end."""

import contextlib
import ctypes
import errno
import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ratchet.errors import EXIT_CRASH, EXIT_SAVE_FAILED, RatchetError
from ratchet.log import LOGGER
from ratchet.stage import Stage

_PR_SET_PDEATHSIG = 1
_NEEDLESS = ("accelerate", "trio")
"""What transformers and its HTTP client import wherever they find it, for calls that no program here makes."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that happens.

    Call it first thing: a parent that ended before the call is noticed by the new parent's id.
    """
    parent = os.environ.get("RATCHET_PARENT")
    if parent is not None:
        die_with(int(parent))


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent, whose id is given, ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_CRASH)


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Around the heavy imports of a program: the collector, which would go through what they make again and again and
    find nothing to free, is off, and leaves it alone afterwards. A sixth of the time that torch and transformers take.
    Packages that are imported only because they are there, a twelfth, are as if they were not.
    """
    gc.disable()
    try:
        with _room_for_lists(), _without(_NEEDLESS):
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _room_for_lists() -> Iterator[None]:
    """Let caches of transformers for which it states no size hold all that they are asked for.

    It makes the list of its models, from 1 500 files in 500 directories, twice, because a cache of directories holds
    128 unless told otherwise. A version that has no such cache is imported as ever.
    """
    lru_cache = functools.lru_cache

    def roomy(maxsize: Any = 128, typed: bool = False) -> Any:
        is_bare = callable(maxsize)
        if is_bare and maxsize.__module__.startswith("transformers."):
            return lru_cache(maxsize=None)(maxsize)
        return lru_cache(maxsize, typed)

    functools.lru_cache = roomy
    try:
        yield
    finally:
        functools.lru_cache = lru_cache


@contextlib.contextmanager
def _without(packages: Sequence[str]) -> Iterator[None]:
    """Let imports of these packages fail, unless they were imported before."""
    absent = [name for name in packages if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for name in absent:
            if name in modules and modules[name] is None:
                del modules[name]


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Around the making of very many objects that hold no cycles: the collector would go through them again and again
    and find nothing to free, for more time than it takes to make them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program to its exit code: an error for which there is a remedy is one log line, not a traceback."""
    try:
        code = main()
    except Exception as error:
        told = _tell(error)
        if told is None:
            raise
        code, sentence = told
        LOGGER.error("%s", sentence)
    with contextlib.suppress(OSError):  # a log on a full disk does not change how a program ended
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _tell(error: Exception) -> tuple[int, str] | None:
    """The exit code and the sentence for what ended this program; None for a defect of ours."""
    stage = Stage.current
    try:
        if stage is not None:
            stage.check()
    except RatchetError as cause:
        is_told = str(error) == str(cause)
        return cause.exit_code, str(cause) if is_told else f"{cause} That ended in {error!r}."
    except OSError as worse:
        error = worse
    if isinstance(error, RatchetError):
        return error.exit_code, str(error)
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            EXIT_SAVE_FAILED,
            f"No more can be written ({reason(error)}): make room, then run the same command again.",
        )
    if stage is not None and is_about(error, stage.paths.root):
        return EXIT_SAVE_FAILED, (
            f"The run directory {stage.paths.root} cannot be written any more ({reason(error)}): make it writable, "
            "then run the same command again."
        )
    return None


def reason(error: OSError) -> str:
    """What the operating system says, and of which file."""
    return f"{error.strerror}: {os.path.normpath(error.filename)}" if error.filename else str(error.strerror)


def why(error: BaseException) -> str:
    """The operating system's reason for an error that a library has wrapped, or the first line of the error itself."""
    seen: list[BaseException] = [error]
    for inner in seen:
        if isinstance(inner, OSError):
            return reason(inner)
        wrapped = getattr(inner, "failures", {})  # of several ranks: torch's CheckpointException
        found = [entry[0] for entry in wrapped.values()] if isinstance(wrapped, dict) else []
        found += [inner.__cause__, inner.__context__]
        seen += [other for other in found if isinstance(other, BaseException) and other not in seen]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def is_about(error: OSError, root: Path) -> bool:
    """Whether an error is that of the file system under a run: of a name below it, or of an open file of it."""
    if error.errno in (errno.EROFS, errno.EIO, errno.ESTALE):
        return True
    is_below = isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(root)
    return is_below and error.errno in (errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.ENODEV)
