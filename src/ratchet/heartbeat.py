"""A sign of life that a frozen process does not give, and that a slow one does.

    daemon thread     touches staging/<token>/heartbeat every second    ──► the launcher looks at the time stamp
    event loop        ticks every second; without ticks the thread stays silent

A thread runs on through a long step, a long compilation and a long wait, so none of these is taken for frozen; a
process that is stopped, or that holds the interpreter for good, gives no sign. The programs that live in an event
loop also prove that the loop turns; one whose work is done by another process, that it answers.

The file lies in the process's own workshop: a process that was replaced finds it gone and ends. It holds a word of
its own, so that another run which has taken the place of this one is not taken for it. Time stamps are compared for
change alone: clocks may jump.
"""

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from ratchet.errors import Fenced, RatchetError
from ratchet.log import LOGGER
from ratchet.stage import Stage

NAME = "heartbeat"
PERIOD_S = 1.0
LATE_TICK_S = 5.0

_current: "Heartbeat | None" = None


class Heartbeat:
    """The heartbeat of one process."""

    def __init__(self, stage: Stage, rank: int = 0) -> None:
        self._path = _path(stage.directory, rank)
        self._stage = stage
        self._word = secrets.token_hex(8)
        self._ticked_at: float | None = None

    @property
    def is_late(self) -> bool:
        """Whether an event loop that was followed has stopped turning."""
        return self._ticked_at is not None and time.monotonic() - self._ticked_at > LATE_TICK_S

    def start(self) -> None:
        """Raises: Fenced if this process was replaced before it began."""
        self._begin()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def tick(self) -> None:
        """From the first tick on, no sign of life without another."""
        self._ticked_at = time.monotonic()

    def follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on, no sign of life without a tick of this loop."""
        self.tick()
        loop.call_later(PERIOD_S, self.follow, loop)

    async def follow_answers(self, ask: Callable[[], Awaitable[object]]) -> None:
        """From now on, no sign of life without an answer: of another process, by way of the running loop."""
        while True:
            await ask()
            self.tick()
            await asyncio.sleep(PERIOD_S)

    def _run(self) -> None:
        while True:
            time.sleep(PERIOD_S)
            if not self.is_late:
                self._beat()

    def _begin(self) -> None:
        try:
            self._path.write_text(self._word)
        except FileNotFoundError:
            self._stage.check()
            raise

    def _beat(self) -> None:
        """One sign of life, or the end of a process that was replaced or has lost its run directory."""
        try:
            self._give_sign()
        except RatchetError as error:
            LOGGER.error("%s", error)
            os._exit(error.exit_code)
        except OSError as error:  # a filesystem that hiccups: the launcher counts the silence
            LOGGER.warning("no sign of life could be given: %s", error)

    def _give_sign(self) -> None:
        """Raises: Fenced, Unwritable, OSError."""
        try:
            os.utime(self._path)
            found = self._path.read_text()
        except FileNotFoundError:
            self._stage.check()
            self._begin()  # somebody tidied up
            return
        if found != self._word:
            raise Fenced(
                f"Another process works as {self._stage.token} in {self._stage.paths.root}; this one stops."
            )


def _path(directory: Path, rank: int) -> Path:
    return directory / (f"{NAME}.{rank}" if rank else NAME)


def start(stage: Stage, rank: int = 0) -> None:
    """Begin to give signs of life, as one of the processes that share a workshop. Raises: Fenced"""
    global _current
    stage.enter()
    _current = Heartbeat(stage, rank)
    _current.start()


def follow_loop() -> None:
    """Tie the signs of life to the running event loop; nothing in a program that belongs to no attempt."""
    if _current is not None:
        _current.follow(asyncio.get_running_loop())


async def follow_answers(ask: Callable[[], Awaitable[object]]) -> None:
    """Tie the signs of life to what answers; nothing in a program that belongs to no attempt."""
    if _current is not None:
        await _current.follow_answers(ask)


def last_beat(directory: Path, rank: int = 0) -> int | None:
    """The time stamp of the newest sign of life of a process that works in `directory`; None before the first."""
    try:
        return _path(directory, rank).stat().st_mtime_ns
    except FileNotFoundError:
        return None
