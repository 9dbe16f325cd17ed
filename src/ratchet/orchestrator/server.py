"""One server of the pool: whether it lives, which weights it holds, and so whether it may be used.

    AWAY ──answers──► JOINING ──given the target──► READY ──the target moved──► UPDATING ──► READY
      ▲                                               └──torn or strange answer──► DOUBTED ──looked at──► READY
      └──────────── no sign of life, from any state

Two tasks. `watch` asks for a sign of life all the time, `keep` looks at what the server holds and gives it what it
lacks; whatever `keep` waits for is cut when `watch` finds the server silent and another one can go on.
"""

import asyncio
import contextlib
import enum
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NoReturn

from ratchet.config import ClientConfig
from ratchet.errors import RatchetError, Refusal
from ratchet.log import LOGGER
from ratchet.orchestrator.calls import Answered, Torn
from ratchet.orchestrator.client import CONFLICT, DAMAGED, UNSEEN, UPDATE, Client, WeightInfo
from ratchet.orchestrator.target import Target
from ratchet.weights import Policy

PROBE_S = 1.0
_AWAY_PROBE_S = 0.1
_BACKOFF_S = 0.05
_BACKOFF_MAX_S = 2.0
_GIVEN_UP_S = 30.0
_DISK_POLL_S = 0.05


class State(enum.Enum):
    """What is known of a server."""

    AWAY = "away"
    JOINING = "joining"
    UPDATING = "updating"
    DOUBTED = "doubted"
    READY = "ready"


SERVING = {State.UPDATING, State.DOUBTED, State.READY}


class Server:
    """A server and what it holds. `generation` counts how often it was found, or made, to hold the right weights."""

    def __init__(
        self,
        client: Client,
        config: ClientConfig,
        target: Target,
        *,
        turn: Callable[["Server"], AbstractAsyncContextManager[object]],
        on_change: Callable[["Server"], None],
        agree: Callable[["Server", WeightInfo], None],
        goes_on_without: Callable[["Server"], bool],
    ) -> None:
        """`turn` is held while its weights change; `agree` refuses a server that differs from the others."""
        self.client = client
        self._config = config
        self._target = target
        self._turn = turn
        self._on_change = on_change
        self._agree = agree
        self._goes_on_without = goes_on_without
        self._look = asyncio.Event()
        self._work = asyncio.Event()
        self._is_strange = False
        self._has_served = False
        self._refused = 0
        self._failed = 0
        self.state = State.AWAY
        self.said = ""
        """What was answered in place of a sign of life, if anything was."""
        self.held = -1
        """The step of the policy that it held when it was last looked at."""
        self._is_elsewhere = False
        """It is on another machine than the trainer: of the directories of a policy it sees that on the disk."""
        self.loading: int | None = None
        self.warming_since = 0.0
        self.generation = 0
        self.faults: Counter[str] = Counter()

    @property
    def is_serving(self) -> bool:
        """Whether rollouts may be in flight there, under the weights that it holds."""
        return self.state in SERVING

    @property
    def oldest(self) -> int | None:
        """The oldest policy that it has, or is reading; None while that is nobody's concern."""
        found = [self.held] if self.is_serving else []
        return min(found + ([] if self.loading is None else [self.loading]), default=None)

    @property
    def is_up_to_date(self) -> bool:
        return self.state is State.READY and self.held == self._target.step

    def doubt(self, generation: int, *, is_strange: bool = False) -> None:
        """Look at the server before it is used again; nothing if that was done since `generation`."""
        if self.generation != generation or self.state is State.AWAY:
            return
        self._is_strange |= is_strange
        if self.state is State.READY:
            self._become(State.DOUBTED)
        self.wake()

    def wake(self) -> None:
        """Something changed: the target, or what is known of this server."""
        self._look.set()
        self._work.set()

    async def run(self) -> None:
        """Watch and keep, until cancelled. Raises: Refusal, RatchetError where no other server can go on."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            tasks.create_task(self._keep())

    async def _watch(self) -> None:
        while True:
            try:
                await self.client.check_health(self._config.liveness_s)
            except (Torn, Answered) as error:
                self._lose(error)
            else:
                self._find()
            self._look.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AWAY_PROBE_S if self.state is State.AWAY else PROBE_S):
                    await self._look.wait()

    def _lose(self, error: Torn | Answered) -> None:
        if isinstance(error, Answered):
            self.said = f"status {error.status}: {error.sentence}"
        else:
            self.said = error.sentence if error.cause in ("status", "answer") else ""
        if self.state is not State.AWAY:
            LOGGER.warning("inference at %s does not answer (%s)", self.client.base_url, error)
            is_silent = isinstance(error, Torn) and error.cause == "timeout"
            self.faults["servers_silent" if is_silent else "servers_lost"] += 1
            self._become(State.AWAY)
        if self._goes_on_without(self):
            self.client.cut()

    def _find(self) -> None:
        if self.state is State.AWAY:
            if self._has_served:
                LOGGER.info("inference at %s answers again", self.client.base_url)
            self._become(State.JOINING)
            self._work.set()

    def _become(self, state: State) -> None:
        self.state = state
        self._on_change(self)

    async def _keep(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._is_behind():
                if self._is_elsewhere and not self._target.is_on_disk:
                    await asyncio.sleep(_DISK_POLL_S)
                    continue
                try:
                    await self._mend()
                except Torn as error:
                    await self._after(error)
                except RatchetError as error:
                    await self._give_up(error)

    def _is_behind(self) -> bool:
        if self.state is State.AWAY or self._target.policy is None:
            return False
        return not self.is_up_to_date

    async def _mend(self) -> None:
        """One step towards the target. Raises: Torn, RatchetError."""
        if self.state is State.READY:
            async with self._turn(self):
                if self.state is not State.READY:
                    return
                self._become(State.UPDATING)
                await self._adopt()
        elif not await self._holds_ours():
            await self._adopt()
        if self.state is State.AWAY or (self.held != self._target.step and not self.is_serving):
            return
        if self.held == self._target.step:
            self._failed, self._refused = 0, 0
        self._has_served = True
        self.generation += 1
        self._become(State.READY)

    async def _holds_ours(self) -> bool:
        """Look at a server; whether its weights may stay. One that was away must hold the target itself."""
        await self.client.connect()
        info = await self.client.weight_info()
        self._agree(self, info)
        step = self._target.step_of(info.weight_version)
        if self._is_strange or info.paused or step is None:
            return False
        if step != self._target.step and not self.is_serving:
            return False
        if not self.is_serving:
            self.warming_since = time.monotonic()
        self.held = step
        return True

    async def _adopt(self) -> None:
        """Give it the target, whatever it holds. Raises: Torn, Refusal, Answered."""
        if self._is_strange:
            LOGGER.warning(
                "the server answered with other weights: %s is given policy %d again",
                self.client.base_url,
                self._target.step,
            )
        policy = self._target.reread()
        self.loading = policy.step
        try:
            directories = self._directories(policy)
            await self.client.adopt(policy, directories, self._target.mode)
        except Answered as error:
            self._judge(error, policy)
        finally:
            self.loading = None
        self.faults["reconciled"] += self._is_strange
        self._is_strange = False
        self.held = policy.step
        self.warming_since = time.monotonic()

    def _directories(self, policy: Policy) -> list[Path]:
        """Where it may read a policy. Raises: Torn if exactly this one is not there any more"""
        if not (found := self._target.directories(policy, on_disk=self._is_elsewhere)):
            raise Torn(
                "answer", f"policy {policy.step} is not published any more under digest {policy.digest}"
            )
        return found

    def _judge(self, error: Answered, policy: Policy) -> NoReturn:
        """What a refused adoption means: the server lost the thread, or it cannot hold these weights."""
        if error.status == UNSEEN and error.path == UPDATE:
            self._note_unseen(error, policy)
        if error.status == DAMAGED and error.path == UPDATE:
            # Also what a directory answers that is being replaced while the server reads it.
            raise Torn("answer", str(error)) from None
        if error.status != CONFLICT:
            raise error
        self._refused += error.path == UPDATE
        if self._refused > 1:
            raise Refusal(
                f"inference at {self.client.base_url} cannot hold policy {policy.step}: {error.sentence}"
            ) from None
        raise Torn("answer", str(error)) from None

    def _note_unseen(self, error: Answered, policy: Policy) -> NoReturn:
        """The server sees no directory of the policy. Raises: Torn; Refusal if it never will"""
        places = self._target.places
        if places.memory is not None and self._target.directories(policy) and not self._is_elsewhere:
            if not places.are_all_on_disk:
                raise Refusal(
                    f"inference at {self.client.base_url} does not see {places.memory.weight(policy.step)}, in the "
                    "memory of the trainer's machine: start it there, or set weights.publish_interval = 1."
                ) from None
            LOGGER.info(
                "inference at %s is on another machine: it gets policies by the disk", self.client.base_url
            )
            self._is_elsewhere = True
        # Or what a directory answers that is being replaced.
        raise Torn("answer", str(error)) from None

    async def _after(self, error: Torn) -> None:
        """A look or an adoption was torn: it is repeated as a whole."""
        if self.state is State.UPDATING:
            self._become(State.DOUBTED)
        self._look.set()
        self._failed += 1
        self.faults["retries"] += 1
        if self._failed > self._config.retries:
            await self._give_up(
                RatchetError(
                    f"the adoption of {self._target.name} at {self.client.base_url} failed {self._failed} times; the "
                    f"last time: {error}. orchestrator.client.retries allows more."
                )
            )
        await asyncio.sleep(min(_BACKOFF_S * 2 ** (self._failed - 1), _BACKOFF_MAX_S))

    async def _give_up(self, error: RatchetError) -> None:
        """Leave this server alone for a while, if it was one of ours and others go on. Raises: `error` otherwise.

        It may be paused in the middle of an update, so what waits for it is played elsewhere.
        """
        if not self._has_served or not self._goes_on_without(self):
            raise error
        LOGGER.error("%s The run goes on without this server for %g s.", error, _GIVEN_UP_S)
        self.faults["servers_given_up"] += 1
        self._failed, self._refused = 1, 0
        if self.state is not State.AWAY:
            self._become(State.JOINING)
        self.client.cut()
        await asyncio.sleep(_GIVEN_UP_S)
