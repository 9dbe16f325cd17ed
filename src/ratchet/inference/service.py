"""What every route needs: the worker, the tokenizer, and how a request becomes sequences and waits for them.

Who waits for whom: a request waits for its sequences, its client going away, or the server stopping, whichever
comes first; a client that goes away takes its sequences out of their slots.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ratchet import lane, rng
from ratchet.chat import Chat
from ratchet.errors import RatchetError, Refusal
from ratchet.inference import wire
from ratchet.inference.adoption import UpdateSequence
from ratchet.inference.engine import Sequence
from ratchet.inference.worker import Worker
from ratchet.log import LOGGER

T = TypeVar("T")
_BODY_BYTES = 4 << 20
_BODY_BYTES_A_TOKEN = 64
_READERS = 2
STOPPING = "The server is stopping."
NOT_FINITE = "The weights yield logits that are not finite: nothing can be sampled from them."


class NotServed(Refusal):
    """A model name that this server does not have."""


class TooLarge(Refusal):
    """A body with more bytes than any request needs."""


class Unavailable(RatchetError):
    """The request cannot be answered now; another server, or a later time, can."""


class Broken(RatchetError):
    """The weights yield numbers that are not finite."""


@dataclass
class Service:
    """What the routes need: the worker, the tokenizer, and what the server calls itself."""

    name: str
    chat: Chat
    worker: Worker
    architecture: str
    facts: dict[str, Any]
    """What `/weight_info` reports besides the weights: slots, dtype, device, threads, ..."""
    updates: UpdateSequence = field(default_factory=UpdateSequence)
    update_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while an update is loaded: no pause or resume slips between a check and what it allows."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    started_at: int = field(default_factory=lambda: int(time.time()))
    _readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_READERS, "reader"))

    @property
    def max_model_len(self) -> int:
        return self.worker.engine.model.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.worker.engine.model.model.get_input_embeddings().weight.shape[0]  # pyright: ignore

    @property
    def body_limit(self) -> int:
        """Bytes of a body at most: many times what a prompt that fits can take."""
        return _BODY_BYTES + _BODY_BYTES_A_TOKEN * self.max_model_len

    async def body(self, request: Request) -> bytes:
        """The body. One that is too large is read to its end, or its client would not hear why, and not kept.

        Raises: TooLarge, ClientGone
        """
        size, parts = 0, []
        try:
            async for part in request.stream():
                size += len(part)
                if size > self.body_limit:
                    parts.clear()
                else:
                    parts.append(part)
        except ClientDisconnect:
            LOGGER.info("a client of %s left after %d bytes of its request", request.scope["path"], size)
            raise ClientGone from None
        if size > self.body_limit:
            raise TooLarge(f"The body has {size} bytes: this server reads {self.body_limit} at most.")
        return b"".join(parts)

    async def aside(self, work: Callable[[], T]) -> T:
        """What may take long, such as tokenising a long text, beside the event loop: it owes signs of life."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            raise NotServed(f"The model {model!r} is not served here; {self.name!r} is.")

    def check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise Refusal("The prompt has no tokens.")
        if len(token_ids) >= self.max_model_len:
            raise Refusal(
                f"The prompt has {len(token_ids)} tokens; with at least one new token that exceeds the maximum model "
                f"length of {self.max_model_len}: shorten it, or raise inference.max_model_len."
            )
        if max(token_ids) >= self.vocab_size or min(token_ids) < 0:
            raise Refusal(
                f"A token id of the prompt is outside the vocabulary of {self.vocab_size}: tokenise by the tokenizer "
                "of the model that is served (model.tokenizer)."
            )

    def sequences(
        self,
        prompt: list[int],
        options: wire.Options,
        max_tokens: int | None,
        stop: str | list[str] | None = None,
    ) -> list[Sequence]:
        """The n sequences of one prompt, each with its own seed."""
        self.check_prompt(prompt)
        stops = [stop] if isinstance(stop, str) else stop or []
        if "" in stops:
            raise Refusal("A stop string must not be empty.")
        ends = set(options.stop_token_ids or ())
        if not options.ignore_eos:
            ends |= set(self.chat.stop_token_ids)
        return [
            Sequence(
                prompt=prompt,
                max_tokens=max_tokens or self.max_model_len,
                temperature=1.0 if options.temperature is None else options.temperature,
                seed=seed,
                stop_token_ids=frozenset(ends),
                stop=tuple(stops),
            )
            for seed in seeds(options.seed, options.n or 1)
        ]

    async def complete(self, request: Request, sequences: list[Sequence]) -> None:
        """Run sequences to their end.

        Raises: Unavailable if the server stops; Broken if a logit is not finite; ClientGone.
        """
        if self.stopping.is_set():
            raise Unavailable(STOPPING)
        finished = asyncio.get_running_loop().create_future()
        missing = len(sequences)

        def on_finish(sequence: Sequence) -> None:
            nonlocal missing
            missing -= 1
            if missing == 0 and not finished.done():
                finished.set_result(None)

        for sequence in sequences:
            sequence.on_finish = on_finish
        self.worker.submit(sequences)
        gone = asyncio.ensure_future(_disconnected(request))
        stopping = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait({finished, gone, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            was_gone = gone.done()
            gone.cancel()
            stopping.cancel()
            if not finished.done():
                self.worker.cancel(sequences)
        if not finished.done():
            raise ClientGone if was_gone else Unavailable(STOPPING)
        if any(sequence.finish_reason == "error" for sequence in sequences):
            raise Broken(NOT_FINITE)

    def info(self) -> dict[str, Any]:
        engine = self.worker.engine
        return {
            "weight_version": engine.version,
            "architecture": self.architecture,
            "paused": self.worker.is_paused,
            "draining": self.worker.is_draining,
            "active": len(engine.active),
            "waiting": self.worker.waiting,
            "lane": lane.VERSION,
            **self.facts,
        }


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def seeds(seed: int | None, n: int) -> list[int]:
    """One seed a choice: the given one for a single choice, derived ones for several, fresh ones without."""
    if seed is None:
        return [secrets.randbits(63) for _ in range(n)]
    return [seed] if n == 1 else [rng.derive(seed, "n", i) for i in range(n)]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def as_json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")
