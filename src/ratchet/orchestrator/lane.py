"""The client's end of a lane (`ratchet.lane`): requests of one turn of the event loop leave as one frame.

Who waits for whom: a request for its own answer, until `timeout_s`, or until the lane is torn; a request that is
cancelled is dropped at the server.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from typing import NamedTuple

import aiohttp
import msgspec

from ratchet.errors import RatchetError
from ratchet.lane import PATH, Answer, Ask, Drop, Failure, decode_answered, encode
from ratchet.orchestrator.calls import Request, Torn

_CLOSE_S = 0.5


class NotSpoken(Exception):
    """The server has no lane: it is asked by one HTTP request each."""


class _Asked(NamedTuple):
    """A request that waits."""

    until_s: float
    answer: "asyncio.Future[Answer | Failure]"


class Lane:
    """One connection. It opens with the first request, and is of no more use once it is torn."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, *, timeout_s: float) -> None:
        self._session = session
        self._base_url = base_url
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count()
        self._waiting: dict[int, _Asked] = {}
        self._outbox: list[Ask | Drop] = []
        self._has_mail = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None
        self._heard_s = self._loop.time()
        self._task = asyncio.create_task(self._run())
        self.is_torn = False

    async def ask(self, request: Request) -> Answer | Failure:
        """Raises: Torn, NotSpoken, RatchetError."""
        id, answer = next(self._ids), self._loop.create_future()
        self._waiting[id] = _Asked(self._loop.time() + self._timeout_s, answer)
        if self._alarm is None:
            self._alarm = self._loop.call_later(self._timeout_s, self._expire)
        self._put(
            Ask(
                id,
                request.token_ids,
                request.seed,
                request.max_tokens,
                request.temperature,
                request.stop_token_ids,
            )
        )
        try:
            return await answer
        except asyncio.CancelledError:
            if self._waiting.pop(id, None) is not None:
                self._put(Drop(id))
            raise

    def tear(self, error: Callable[[], Exception]) -> None:
        """End every request that waits with an error, each its own, and close the connection."""
        if self.is_torn:
            return
        self.is_torn = True
        if self._alarm is not None:
            self._alarm.cancel()
        waiting, self._waiting = self._waiting, {}
        for asked in waiting.values():
            if not asked.answer.done():
                asked.answer.set_exception(error())
        self._task.cancel()

    async def close(self) -> None:
        """Close the connection, and wait until it is."""
        self.tear(lambda: Torn("connection", "the lane was closed"))
        await asyncio.gather(self._task, return_exceptions=True)

    def _put(self, message: Ask | Drop) -> None:
        self._outbox.append(message)
        self._has_mail.set()

    def _expire(self) -> None:
        """Tear what waited too long, and the lane if nothing came over it meanwhile: something on the way may have
        dropped the connection without a word. All wait equally long, so the oldest come first."""
        now, self._alarm = self._loop.time(), None
        for id, asked in list(self._waiting.items()):
            if asked.until_s > now:
                self._alarm = self._loop.call_at(asked.until_s, self._expire)
                break
            if self._heard_s <= asked.until_s - self._timeout_s:
                self.tear(lambda: Torn("timeout", f"nothing came over the lane for {self._timeout_s:g} s"))
                break
            del self._waiting[id]
            self._put(Drop(id))
            if not asked.answer.done():
                asked.answer.set_exception(Torn("timeout", f"no answer within {self._timeout_s:g} s"))

    async def _run(self) -> None:
        try:
            socket = await self._session.ws_connect(self._base_url + PATH, max_msg_size=0)
            try:
                await self._talk(socket)
            finally:
                await _close(socket)
        except aiohttp.WSServerHandshakeError as error:
            self._refused(error.status)
        except (aiohttp.ClientError, OSError) as error:
            said = f"{type(error).__name__} {error}".strip()
            self.tear(lambda: Torn("connection", said))
        except msgspec.DecodeError as error:
            said = f"inference at {self._base_url} answered {PATH} with something else: {error}."
            self.tear(lambda: RatchetError(said))
        except Exception as error:
            self.tear(lambda error=error: error)
        else:
            self.tear(lambda: Torn("connection", "the server closed the lane"))

    def _refused(self, status: int) -> None:
        if status >= 500:
            self.tear(lambda: Torn("status", f"status {status}"))
        else:
            self.tear(NotSpoken)

    async def _talk(self, socket: "aiohttp.ClientWebSocketResponse[bool]") -> None:
        writer = asyncio.create_task(self._write(socket))
        try:
            while (message := await socket.receive()).type is aiohttp.WSMsgType.BINARY:
                self._heard_s = self._loop.time()
                for said in decode_answered(message.data):
                    self._give(said)
        finally:
            writer.cancel()

    async def _write(self, socket: "aiohttp.ClientWebSocketResponse[bool]") -> None:
        with contextlib.suppress(
            aiohttp.ClientError, OSError
        ):  # the reader sees the end of the connection too
            while True:
                await self._has_mail.wait()
                self._has_mail.clear()
                outbox, self._outbox = self._outbox, []
                await socket.send_bytes(encode(outbox))

    def _give(self, said: Answer | Failure) -> None:
        asked = self._waiting.pop(said.id, None)
        if asked is not None and not asked.answer.done():
            asked.answer.set_result(said)


async def _close(socket: "aiohttp.ClientWebSocketResponse[bool]") -> None:
    """Say goodbye; a server that is frozen, or reads nothing, does not answer it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_S):
            await socket.close()
