"""Requests to stop, by signal: the first asks for the end of the step and a save, a second one for the end at once."""

import signal
import time
from dataclasses import dataclass
from types import FrameType

SAME_S = 0.5
"""Signals so close together are one request: a scheduler signals every process of a job, and a wrapper passes on
what it was sent itself."""


@dataclass
class Stopping:
    """How often this launcher was asked to stop."""

    requests: int = 0
    """By signals of its own."""
    is_told: bool = False
    """By the launcher of another node, which may have had the same signal."""
    _latest: float = -SAME_S

    @property
    def is_asked(self) -> bool:
        return self.is_told or self.requests > 0

    @property
    def is_urgent(self) -> bool:
        return self.requests > 1

    def install(self) -> None:
        """Count SIGINT and SIGTERM from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._latest > SAME_S:
            self.requests += 1
        self._latest = now
