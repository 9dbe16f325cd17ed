"""Start programs by a nursery, which has imported torch once for all of them and for all that will replace them.

Imports are nine tenths of a program's start: five CPU seconds each, three seconds and more until a crashed one is back.
Where the nursery is not to be had, or dies, a program is started as a process of its own.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from ratchet.errors import EXIT_STOPPED
from ratchet.launch.early import Begun
from ratchet.nursery import Order

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.005


class Process(Protocol):
    """What a launcher does with a program, however it was started: `subprocess.Popen`, or `Birth`."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...


class Nursery:
    """Verbs: start, rest, close."""

    def __init__(self, roles: Iterable[str], begun: Begun) -> None:
        """What has begun to import is for programs of these roles.

        Raises: OSError where this process cannot adopt what is forked
        """
        self.roles = frozenset(roles)
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
        self._expected: deque[Birth] = deque()
        self._process, self._link = begun.process, begun.link
        self._link.setblocking(False)

    def start(self, order: Order, otherwise: Callable[[], Process]) -> Process:
        """A program that is born when the nursery has imported, or by `otherwise` if that does not live so long."""
        gate, leave = os.pipe()
        try:
            socket.send_fds(self._link, [msgspec.json.encode(order)], [*order.fds, gate])
        except OSError:  # it is dead, or has more to read than it takes
            os.close(leave)
            return otherwise()
        finally:
            os.close(gate)
        self._expected.append(Birth(self, otherwise, leave))
        return self._expected[-1]

    def rest(self, timeout_s: float) -> None:
        """Wait for that long, or until a program is born: it waits for leave to begin."""
        select.select([self._link] if self._expected else [], [], [], timeout_s)
        self.listen()

    def listen(self) -> None:
        """Hear of the programs that were born since; none comes any more once the nursery is dead."""
        try:
            while self._expected and (answer := self._link.recv(32)):
                self._expected.popleft().begin(int(answer))
        except BlockingIOError:
            return
        except OSError:
            pass
        while self._expected:
            self._expected.popleft().begin(None)

    def give_up(self) -> None:
        """From now on programs are started otherwise, those that are awaited too."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """What was born lives on; what is awaited must have been told to end."""
        self.give_up()
        self.listen()
        self._link.close()


class Birth:
    """A program that a nursery forks, to be treated like a `subprocess.Popen`.

    It does nothing before it is given leave, which it is once its process id is known: one of which a dying nursery
    did not tell ends by itself, so that none can work beside the program that is started in its place.
    """

    def __init__(self, nursery: Nursery, otherwise: Callable[[], Process], leave: int) -> None:
        """`leave` is the end of a pipe at whose other end it waits."""
        self._nursery = nursery
        self._otherwise = otherwise
        self._leave = leave
        self._other: Process | None = None
        self._pid: int | None = None
        self._code: int | None = None

    def begin(self, pid: int | None) -> None:
        """It was born, or never will be. One that was ended before that is not to be."""
        self._pid = pid
        if self._code is None and pid is not None:
            with contextlib.suppress(BrokenPipeError):  # it has died; its exit code will say so
                os.write(self._leave, b"1")
        os.close(self._leave)
        if self._code is None and pid is None:
            self._other = self._otherwise()
        elif self._code is not None and pid is not None:
            os.waitpid(pid, 0)

    def poll(self) -> int | None:
        """The exit code, or None while it lives or is awaited."""
        if self._code is None and self._pid is None and self._other is None:
            self._nursery.listen()
        if self._other is not None:
            return self._other.poll()
        if self._code is None and self._pid is not None:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Raises: TimeoutExpired"""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and timeout is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            time.sleep(_POLL_S)
        return code

    def send_signal(self, sig: int, /) -> None:
        """Before it was born: asked to stop, it has stopped; killed, it may have been awaited for too long."""
        if self.poll() is not None:
            return
        if self._other is not None:
            self._other.send_signal(sig)
        elif self._pid is not None:
            os.kill(self._pid, sig)
        elif sig == signal.SIGKILL:
            self._code = -sig
            self._nursery.give_up()
        else:
            self._code = EXIT_STOPPED
