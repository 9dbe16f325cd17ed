"""The lane: one connection for all requests of a client to a server; each answer comes back as soon as it is finished.

A WebSocket at PATH, beside vLLM's routes, which stay what every other client uses. A frame is a msgpack array of
messages: all that one side had to say in one turn of its event loop. So neither waits for a frame to fill up, and
what is asked or finished together costs one frame instead of one HTTP request each.

    client ──► server   Ask, Drop
    client ◄── server   Answer, Failure

A server that has it says `"lane": VERSION` in `/weight_info`. The end of the connection tears what was asked and not
answered, and nothing else; the server then takes it out of its slots.
"""

import msgspec

PATH = "/inference/v1/lane"
VERSION = 1


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """One answer to be sampled. The client chooses the id, and uses none twice on one connection."""

    id: int
    token_ids: list[int]
    seed: int
    max_tokens: int
    temperature: float
    stop_token_ids: list[int]


class Drop(msgspec.Struct, frozen=True, array_like=True, tag="drop"):
    """Nobody waits for this answer any more; it may come all the same."""

    id: int


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """What was sampled. `versions` are (name, start, end): tokens [start, end) are those of weights of this name."""

    id: int
    token_ids: list[int]
    logprobs: list[float]
    versions: list[tuple[str, int, int]]
    finish_reason: str


class Failure(msgspec.Struct, frozen=True, array_like=True, tag="failure"):
    """Why there is no answer: the status and the sentence that an HTTP request would have been given."""

    id: int
    status: int
    sentence: str


_ENCODER = msgspec.msgpack.Encoder()
_ASKED = msgspec.msgpack.Decoder(list[Ask | Drop])
_ANSWERED = msgspec.msgpack.Decoder(list[Answer | Failure])


def encode(messages: list[Ask | Drop] | list[Answer | Failure]) -> bytes:
    return _ENCODER.encode(messages)


def decode_asked(frame: bytes) -> list[Ask | Drop]:
    """What a client says. Raises: msgspec.DecodeError."""
    return _ASKED.decode(frame)


def decode_answered(frame: bytes) -> list[Answer | Failure]:
    """What a server says. Raises: msgspec.DecodeError."""
    return _ANSWERED.decode(frame)
