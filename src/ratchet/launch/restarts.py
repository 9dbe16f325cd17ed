"""When a program is started again, and when it counts as frozen. Pure: no clocks, no files."""

from collections.abc import Sequence
from dataclasses import dataclass

from ratchet.config import LaunchConfig
from ratchet.errors import (
    EXIT_FENCED,
    EXIT_OK,
    EXIT_POISON,
    EXIT_REFUSED,
    EXIT_SAVE_FAILED,
    EXIT_STOPPED,
)

# Starting again would end the same way, or was not wanted.
FINAL = {EXIT_OK, EXIT_REFUSED, EXIT_POISON, EXIT_SAVE_FAILED, EXIT_STOPPED, EXIT_FENCED}
BACKOFF_MAX_S = 60.0
# Until the first sign of life: imports may hold the interpreter, and no work is lost.
STARTUP_S = 120.0
GAP_S = 5.0


@dataclass(frozen=True)
class Verdict:
    """What happens to a program that ended: it is started again after `delay_s`, or not, and why."""

    delay_s: float | None
    why: str = ""


def judge(config: LaunchConfig, code: int, restarted_at: Sequence[float], now: float) -> Verdict:
    """Whether a program that ended with `code` is started again.

    Units: `restarted_at`, the times of its earlier restarts, and `now` in seconds of one clock.
    """
    if code in FINAL or config.max_restarts == 0:
        return Verdict(None)
    recent = sum(now - at < config.restart_window_s for at in restarted_at)
    if recent >= config.max_restarts:
        return Verdict(
            None,
            f"it was started again {recent} time{'s' * (recent > 1)} within {config.restart_window_s:g} s "
            "(launch.max_restarts, launch.restart_window_s)",
        )
    return Verdict(min(config.backoff_s * 2**recent, BACKOFF_MAX_S))


class Pulse:
    """Follows the heartbeat of one process by the observer's own clock: only changes of the stamp count."""

    def __init__(self, frozen_s: float, now: float) -> None:
        self._frozen_s = frozen_s
        self._beat: int | None = None
        self._since = self._looked = now

    def is_frozen(self, beat: int | None, now: float) -> bool:
        """Take one look. An observer that was held up itself begins to wait afresh."""
        if beat != self._beat or now - self._looked > GAP_S:
            self._beat, self._since = beat, now
        self._looked = now
        limit = self._frozen_s if beat is not None else max(self._frozen_s, STARTUP_S)
        return now - self._since > limit
