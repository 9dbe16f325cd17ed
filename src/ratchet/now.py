"""staging/<token>/now.json: what the orchestrator of an open attempt is at, written every second for who watches."""

import msgspec

from ratchet.paths import RunPaths

NAME = "now.json"


class Now(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one second."""

    policy: int
    """The policy that the server holds; -1 before the first."""
    batch: int
    """The batch that is being made."""
    groups_running: int
    groups_ready: int
    groups_wanted: int
    """How many make a batch."""
    rollouts_running: int
    dropped: dict[str, int] = {}
    """Rollouts dropped since the newest batch, by reason."""
    evaluating: int | None = None
    """The policy whose evaluation is being played."""


def read(paths: RunPaths) -> Now | None:
    """Of the newest orchestrator that is alive; None where there is none, or while it is being written."""
    found = sorted(paths.staging.glob(f"*.orchestrator.*/{NAME}"))
    try:
        return msgspec.json.decode(found[-1].read_bytes(), type=Now) if found else None
    except (OSError, msgspec.MsgspecError):
        return None
