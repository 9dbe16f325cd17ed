"""What is asked of a server, what comes back, and what goes wrong: the words of every way to ask."""

from typing import Literal

import msgspec

from ratchet.errors import EXIT_CRASH, EXIT_REFUSED, RatchetError

PauseMode = Literal["keep", "wait"]
Cause = Literal["connection", "timeout", "status", "answer", "silent"]


class Span(msgspec.Struct, frozen=True):
    """Tokens [start, end) of a completion were sampled under weights of this name."""

    version: str
    start: int
    end: int


class Completion(msgspec.Struct, frozen=True):
    """One sampled answer; `logprobs` are those of the sampling distribution."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[Span]
    finish_reason: str


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to be sampled; the same request gives the same answer, whoever gives it."""

    token_ids: list[int]
    seed: int
    max_tokens: int
    temperature: float
    stop_token_ids: list[int]


class Torn(Exception):
    """A request yielded nothing, by no fault of its own: it may be repeated."""

    def __init__(self, cause: Cause, sentence: str) -> None:
        super().__init__(sentence)
        self.cause: Cause = cause
        self.sentence = sentence


_PASSING = {404, 409, 410}
"""What a server answers that holds another model, or is in another state, than it was known for."""


class Answered(RatchetError):
    """The server understood a request and says no; repeating it would change nothing.

    Nor would starting the orchestrator again, unless the server may be another one by then.
    """

    def __init__(self, path: str, status: int, sentence: str) -> None:
        super().__init__(f"inference answered {path} with {status}: {sentence}")
        self.exit_code = EXIT_CRASH if status in _PASSING else EXIT_REFUSED
        self.path = path
        self.status = status
        self.sentence = sentence


def refusal(path: str, status: int, sentence: str) -> Torn | Answered:
    """What an answer of status 400 or above means."""
    if status >= 500 or status == 429:
        return Torn("status", f"status {status}: {sentence}")
    return Answered(path, status, sentence)
