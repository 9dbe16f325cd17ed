"""One thing that was looked at before a run, and what came of it."""

from typing import Literal

import msgspec

from ratchet.errors import Refusal

Verdict = Literal["ok", "warning", "fails"]


class Finding(msgspec.Struct, frozen=True):
    """`text` says what was seen; where that is not as it must be, it goes on with why, and `remedy` with what to do."""

    name: str
    verdict: Verdict
    text: str
    remedy: str = ""


def of_refusal(name: str, error: Refusal) -> Finding:
    """A refusal has its remedy in its sentence."""
    return Finding(name, "fails", str(error).rstrip("."))
