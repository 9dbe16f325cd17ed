"""Which server answers which request. Pure bookkeeping: no I/O, no asyncio, no clock.

    ask ──► waiting ──(place)──► at a server ──► finish
              └──► withdraw

A server takes requests while it is open. Requests go, in the order in which they were asked, to the home of their
group, whose prompt that server has just read, unless it has more than its share; otherwise to the one with the
least to do. Where a request is answered changes no result, so nothing here is part of the run's state.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import msgspec

SLOW_START_SHARE = 1 / 8
_HOMES_REMEMBERED = 10_000


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that routing depends on."""

    capacity: int
    """Requests that are open at one server at most."""
    slack: int
    """A home may have so many requests more than the server with the least to do."""
    slow_start_s: float


@dataclass
class _Place:
    """One server as the router sees it."""

    opened_at: float | None = None
    tickets: set[int] = field(default_factory=set)


class Router:
    """Verbs: ask / withdraw, place / finish, open / close."""

    def __init__(self, servers: int, rules: Rules) -> None:
        self._rules = rules
        self._places = [_Place() for _ in range(servers)]
        self._waiting: OrderedDict[int, Hashable] = OrderedDict()
        self._homes: OrderedDict[Hashable, int] = OrderedDict()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def busy(self, server: int) -> int:
        """How many requests are open at a server."""
        return len(self._places[server].tickets)

    def open(self, server: int, since: float) -> None:
        """Let a server take requests; its share grows from `since` on."""
        self._places[server].opened_at = since

    def close(self, server: int) -> None:
        """Let a server take no more requests; those that are open there stay until they are finished."""
        self._places[server].opened_at = None

    def ask(self, ticket: int, group: Hashable) -> None:
        """Queue a request; those of one group belong together."""
        self._waiting[ticket] = group

    def withdraw(self, ticket: int) -> None:
        """Forget a request that was not placed."""
        self._waiting.pop(ticket, None)

    def place(self, now: float) -> list[tuple[int, int]]:
        """The requests that may go now, each with its server."""
        placed = []
        while self._waiting:
            ticket, group = next(iter(self._waiting.items()))
            server = self._choose(group, now)
            if server is None:
                break
            del self._waiting[ticket]
            self._places[server].tickets.add(ticket)
            placed.append((ticket, server))
        return placed

    def finish(self, ticket: int, server: int) -> None:
        """A placed request was answered, or torn."""
        self._places[server].tickets.discard(ticket)

    def _choose(self, group: Hashable, now: float) -> int | None:
        """A server with room for a request of this group; None if there is none."""
        open_ones = [i for i, place in enumerate(self._places) if place.opened_at is not None]
        able = [i for i in open_ones if self.busy(i) < self._rules.capacity]
        if not able:
            return None
        least = min(able, key=lambda i: self._load(i, now))
        home = self._homes.get(group)
        if home in able and self._load(home, now, self._rules.slack) <= self._load(least, now):
            self._homes.move_to_end(group)
            return home
        if home not in open_ones:
            self._settle(group, least)
        return least

    def _settle(self, group: Hashable, server: int) -> None:
        """Make a server the home of a group. A group that is forgotten loses its preference, nothing else."""
        self._homes[group] = server
        self._homes.move_to_end(group)
        if len(self._homes) > _HOMES_REMEMBERED:
            self._homes.popitem(last=False)

    def _load(self, server: int, now: float, slack: int = 0) -> float:
        """What one more request would make of a server: requests, but for `slack`, for its share of the work."""
        return (self.busy(server) + 1 - slack) / self._share(server, now)

    def _share(self, server: int, now: float) -> float:
        """From an eighth, when it was opened, to 1: nothing is warm there yet."""
        opened_at, ramp_s = self._places[server].opened_at, self._rules.slow_start_s
        if opened_at is None or now - opened_at >= ramp_s:
            return 1.0
        return SLOW_START_SHARE + (1 - SLOW_START_SHARE) * (now - opened_at) / ramp_s
