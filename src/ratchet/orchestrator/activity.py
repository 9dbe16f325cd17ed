"""What the orchestrator shows of itself to people: when the server was busy for it, and how far the next batch is."""

import time

import msgspec

from ratchet.now import NAME, Now
from ratchet.stage import Stage
from ratchet.timeline import Timeline


class Activity:
    """The stretches in which rollouts were in flight, cut where a batch is taken, as `generate` phases."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._since: float | None = None
        self._batch = 0

    def see(self, running: int, batch: int) -> None:
        """Look at how many groups are in flight; `batch` is the one that they are played for."""
        self._batch = batch
        if running and self._since is None:
            self._since = time.perf_counter()
        elif not running:
            self.end(running)

    def end(self, running: int) -> None:
        """A batch is taken, or nothing is in flight any more."""
        now = time.perf_counter()
        if self._since is not None:
            self._timeline.add("generate", self._batch + 1, now - self._since)
        self._since = now if running else None

    def tell(self, stage: Stage, now: Now) -> None:
        """Leave the state of this second in the workshop. It goes with the workshop, and nothing decides by it."""
        try:
            (stage.directory / NAME).write_bytes(msgspec.json.encode(now))
        except FileNotFoundError:
            stage.check()
            raise
