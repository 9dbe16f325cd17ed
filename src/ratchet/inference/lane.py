"""The server's end of a lane: what is asked goes to the engine at once, what an engine step finishes goes back as one
frame.

Who waits for whom: the reader for frames, the writer for finished sequences; nobody for the longest. A connection
that ends takes its sequences out of their slots.
"""

import asyncio
from functools import partial

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from ratchet.errors import Refusal
from ratchet.inference import wire
from ratchet.inference.engine import Sequence
from ratchet.inference.service import NOT_FINITE, Service
from ratchet.lane import Answer, Ask, Failure, decode_asked, encode
from ratchet.log import LOGGER

_BAD_FRAME = 1007
_REFUSED, _BROKEN = 400, 500


class Lane:
    """One connection. `run` returns when it ends."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        self._service = service
        self._socket = socket
        self._open: dict[int, Sequence] = {}
        self._said: list[Answer | Failure] = []
        self._has_said = asyncio.Event()

    async def run(self) -> None:
        await self._socket.accept()
        try:
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write())
                await self._read()
                writer.cancel()
        finally:
            self._service.worker.cancel(list(self._open.values()))

    async def _read(self) -> None:
        while True:
            try:
                frame = await self._socket.receive_bytes()
                asked = decode_asked(frame)
            except WebSocketDisconnect:
                return
            except (KeyError, msgspec.DecodeError) as error:
                await self._socket.close(_BAD_FRAME, f"not a frame of a lane: {error}"[:120])
                return
            self._take([message for message in asked if isinstance(message, Ask)])
            self._drop([message.id for message in asked if not isinstance(message, Ask)])

    def _take(self, asked: list[Ask]) -> None:
        """Give the engine what can be sampled. The error of one is that one's alone."""
        taken = []
        for ask in asked:
            try:
                sequence = self._sequence(ask)
            except Refusal as error:
                self._say(Failure(ask.id, _REFUSED, str(error)))
                continue
            except Exception as error:  # a defect, or a number out of all bounds: not the others' concern
                LOGGER.exception("a request on the lane failed")
                self._say(Failure(ask.id, _BROKEN, repr(error)))
                continue
            sequence.on_finish = partial(self._finish, ask.id)
            self._open[ask.id] = sequence
            taken.append(sequence)
        self._service.worker.submit(taken)

    def _sequence(self, ask: Ask) -> Sequence:
        """Raises: Refusal."""
        options = wire.sampling_params(
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            stop_token_ids=ask.stop_token_ids,
        )
        (sequence,) = self._service.sequences(ask.token_ids, options, options.max_tokens)
        return sequence

    def _drop(self, ids: list[int]) -> None:
        dropped = [sequence for id in ids if (sequence := self._open.pop(id, None)) is not None]
        self._service.worker.cancel(dropped)

    def _finish(self, id: int, sequence: Sequence) -> None:
        if self._open.pop(id, None) is None:
            return
        if sequence.finish_reason == "error":
            self._say(Failure(id, _BROKEN, NOT_FINITE))
            return
        spans = [(span.version, span.start, span.end) for span in sequence.spans]
        assert sequence.finish_reason is not None
        self._say(Answer(id, sequence.token_ids, sequence.logprobs, spans, sequence.finish_reason))

    def _say(self, message: Answer | Failure) -> None:
        self._said.append(message)
        self._has_said.set()

    async def _write(self) -> None:
        while True:
            await self._has_said.wait()
            self._has_said.clear()
            said, self._said = self._said, []
            try:
                await self._socket.send_bytes(encode(said))
            except WebSocketDisconnect:
                return
