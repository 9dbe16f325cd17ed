"""What every program of a run does at its start and at its end."""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from ratchet import heartbeat
from ratchet.errors import EXIT_CRASH, EXIT_FENCED, EXIT_SAVE_FAILED, RatchetError
from ratchet.log import LOGGER

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that happens.

    Call it first thing: a parent that ended before the call is noticed by the new parent's id.
    """
    parent = os.environ.get("RATCHET_PARENT")
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        os._exit(EXIT_CRASH)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program to its exit code: an error that we raise on purpose is one log line, not a traceback."""
    try:
        code = main()
    except RatchetError as error:
        LOGGER.error("%s", error)
        code = EXIT_FENCED if heartbeat.is_fenced() else error.exit_code
    except Exception as error:
        if heartbeat.is_fenced():
            LOGGER.error("replaced by a newer process; that ended in %r", error)
            code = EXIT_FENCED
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            LOGGER.error("The disk is full (%s): make room, then run the same command again.", error)
            code = EXIT_SAVE_FAILED
        else:
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
