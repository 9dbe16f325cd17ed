"""The inference servers of a run as one: requests are routed, torn ones played elsewhere, weights given to all.

Who waits for whom:

    a request     a server that is open and has room (Router); after a torn one, a server again, the same or another
    an update     in asynchronous mode its turn, so that one at a time of those with rollouts in flight changes its
                  weights; in deterministic mode nobody: all change at once, and `adopt` returns when all have
    a server      its own signs of life (Server)
    the run       only all servers: one that is dead or frozen is left out until it answers and holds the right weights

Which server answers a request changes no result where all have the same settings and are batch-invariant.
"""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import msgspec

from ratchet.config import ClientConfig
from ratchet.errors import RatchetError, Refusal
from ratchet.log import LOGGER
from ratchet.metrics import Row
from ratchet.orchestrator.calls import Completion, Request, Torn
from ratchet.orchestrator.client import Client, WeightInfo, nobody_answers
from ratchet.orchestrator.routing import Router, Rules
from ratchet.orchestrator.server import Server, State
from ratchet.orchestrator.target import Target
from ratchet.weights import Policy

_BACKOFF_S = 0.05
_BACKOFF_MAX_S = 2.0
_MOURN_S = 0.1


class Strange(Exception):
    """Tokens of weights that are not ours: whatever was sampled is discarded."""


class Answer(NamedTuple):
    """A completion, and the step of the policy of each of its spans."""

    completion: Completion
    steps: list[int]


class Use(msgspec.Struct):
    """What one server answered so far."""

    requests: int = 0
    tokens: int = 0


class Pool:
    """The servers. `faults` counts by cause what was torn, lost and mended."""

    def __init__(
        self,
        clients: Sequence[Client],
        config: ClientConfig,
        target: Target,
        rules: Rules,
        *,
        on_change: Callable[[], None],
    ) -> None:
        self._config = config
        self._target = target
        self._router = Router(len(clients), rules)
        self._on_change = on_change
        self._rolling = asyncio.Lock()
        self._servers = [
            Server(
                client,
                config,
                target,
                turn=self._turn,
                on_change=self._note,
                agree=self._agree,
                goes_on_without=self._goes_on_without,
            )
            for client in clients
        ]
        self._tickets = itertools.count()
        self._asked: dict[int, asyncio.Future[int]] = {}
        self._changed = asyncio.Event()
        self._first: tuple[str, dict[str, Any]] | None = None
        self._faults: Counter[str] = Counter()
        self._uses = [Use() for _ in clients]

    @property
    def urls(self) -> str:
        return ", ".join(server.client.base_url for server in self._servers)

    @property
    def max_model_len(self) -> int | None:
        return None if self._first is None else self._first[1]["max_model_len"]

    @property
    def target(self) -> Target:
        return self._target

    @property
    def step(self) -> int:
        """The oldest policy that a server in use holds, so what may be drawn now; -1 while there is none."""
        return min((server.held for server in self._servers if server.is_serving), default=-1)

    @property
    def oldest(self) -> int:
        """The oldest policy that a server has or will be given: nothing below it is needed any more."""
        found = [server.oldest for server in self._servers]
        return min([self._target.step, *(step for step in found if step is not None)])

    @property
    def faults(self) -> Counter[str]:
        """How often what went wrong, so far."""
        return sum((server.faults for server in self._servers), self._faults)

    def usage(self) -> list[Use]:
        """What each server answered so far, in the order of their URLs."""
        return [msgspec.structs.replace(use) for use in self._uses]

    async def run(self) -> None:
        """Keep the servers, until cancelled. Raises: Refusal, RatchetError."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._mourn())
            for server in self._servers:
                tasks.create_task(server.run())

    async def _mourn(self) -> None:
        """Raises: Refusal if nobody ever answers, RatchetError if all fell silent for too long."""
        heard_at, kind = time.monotonic(), Refusal
        while True:
            if any(server.state is not State.AWAY for server in self._servers):
                heard_at, kind = time.monotonic(), RatchetError
            elif time.monotonic() - heard_at > self._config.wait_s:
                others = {server.client.base_url: server.said for server in self._servers if server.said}
                urls = [server.client.base_url for server in self._servers]
                raise kind(nobody_answers(urls, self._config.wait_s, others))
            await asyncio.sleep(_MOURN_S)

    async def connect(self) -> None:
        """Wait until a server answers; `run` must be running, and says when that takes too long."""
        await self._until(lambda: any(server.state is not State.AWAY for server in self._servers))

    async def adopt(self, policy: Policy) -> None:
        """Have every server hold `policy`. In deterministic mode returns when those in use do."""
        self._target.move(policy)
        for server in self._servers:
            server.wake()
        if self._target.is_exact:
            await self.settled()

    async def settled(self) -> None:
        """Wait until all servers in use hold the target, and there is one."""
        await self._until(self._is_settled)

    def _is_settled(self) -> bool:
        serving = [server for server in self._servers if server.is_serving]
        return bool(serving) and all(server.is_up_to_date for server in serving)

    async def generate(self, request: Request, group: Hashable, only: int | None = None) -> Answer:
        """Sample one answer, wherever it succeeds.

        Raises: Strange if a token is not by a policy of ours, or not by policy `only`; RatchetError after
        `client.retries` torn requests.
        """
        failed, last = 0, None
        while True:
            ticket, index = await self._enter(group)
            server = self._servers[index]
            generation = server.generation
            self._faults["failovers"] += last not in (None, index)
            last = index
            try:
                completion = await server.client.generate(request)
                break
            except Torn as error:
                failed += 1
                self._count(error, server, failed)
                server.doubt(generation)
            finally:
                self._leave(ticket, index)
            await asyncio.sleep(min(_BACKOFF_S * 2 ** (failed - 1), _BACKOFF_MAX_S))
        steps = self._target.steps_of(completion.versions, only)
        if steps is None:
            server.doubt(generation, is_strange=True)
            raise Strange
        self._uses[index].requests += 1
        self._uses[index].tokens += len(completion.token_ids)
        return Answer(completion, steps)

    def _count(self, error: Torn, server: Server, failed: int) -> None:
        self._faults["retries"] += 1
        self._faults[f"torn/{error.cause}"] += 1
        if failed > self._config.retries:
            raise RatchetError(
                f"/inference/v1/generate failed {failed} times; the last time at {server.client.base_url}: {error}. "
                "orchestrator.client.retries allows more."
            ) from None

    async def _enter(self, group: Hashable) -> tuple[int, int]:
        """Wait for a place; the ticket for it, and the server."""
        ticket = next(self._tickets)
        asked = self._asked[ticket] = asyncio.get_running_loop().create_future()
        self._router.ask(ticket, group)
        self._place()
        try:
            return ticket, await asked
        except asyncio.CancelledError:
            self._router.withdraw(ticket)
            self._asked.pop(ticket, None)
            if asked.done() and not asked.cancelled():
                self._leave(ticket, asked.result())
            raise

    def _leave(self, ticket: int, index: int) -> None:
        self._router.finish(ticket, index)
        self._place()

    def _place(self) -> None:
        for ticket, index in self._router.place(time.monotonic()):
            asked = self._asked.pop(ticket)
            if asked.cancelled():
                self._leave(ticket, index)
            else:
                asked.set_result(index)

    def _note(self, server: Server) -> None:
        """A server changed its state: it takes requests, or takes none any more."""
        index = self._servers.index(server)
        if server.state is State.READY:
            self._router.open(index, server.warming_since)
        else:
            self._router.close(index)
        self._place()
        self._changed.set()
        self._on_change()

    def _turn(self, server: Server) -> contextlib.AbstractAsyncContextManager[object]:
        """To be held while a server changes its weights. One with nothing to do interrupts nobody."""
        is_idle = self._router.busy(self._servers.index(server)) == 0
        return contextlib.nullcontext() if self._target.is_exact or is_idle else self._rolling

    def _goes_on_without(self, server: Server) -> bool:
        return any(other.is_serving for other in self._servers if other is not server)

    def _agree(self, server: Server, info: WeightInfo) -> None:
        """Raises: Refusal if a server differs from the first one in what results depend on."""
        own = {"max_model_len": server.client.max_model_len}
        if self._target.is_exact and len(self._servers) > 1:
            own |= info.settings
            self._check_invariance(server, info)
        url, first = self._first or (server.client.base_url, own)
        if different := [name for name in own if own[name] != first[name]]:
            ours, theirs = (", ".join(f"{n} {facts[n]}" for n in different) for facts in (own, first))
            raise Refusal(
                f"Two servers have different settings ({ours} at {server.client.base_url}, {theirs} at {url}), so a "
                "result would depend on which of them answers: start all with the same."
            )
        self._first = url, own

    def _check_invariance(self, server: Server, info: WeightInfo) -> None:
        if info.batch_invariant is False:
            raise Refusal(
                f"Answers of {server.client.base_url} depend on what is sampled beside them, so with several servers "
                "on which of them answers: choose another number of inference.slots, or set deterministic = false."
            )
        if info.batch_invariant is None and self._first is None:
            LOGGER.warning(
                "inference at %s does not state that it is batch-invariant: whether results depend on which server "
                "answers is not known",
                server.client.base_url,
            )

    async def _until(self, claim: Callable[[], bool]) -> None:
        while not claim():
            self._changed.clear()
            await self._changed.wait()


def use_rows(before: Sequence[Use], now: Sequence[Use], seconds: float) -> Row:
    """What each of several servers did in a while; nothing for a single one."""
    row: Row = {}
    if len(now) > 1:
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            row[f"perf/server_{index}/requests"] = new.requests - old.requests
            row[f"perf/server_{index}/tokens_per_s"] = (new.tokens - old.tokens) / max(seconds, 1e-9)
    return row
