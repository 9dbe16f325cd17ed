"""Which policy the server holds: the one place that changes it, and that says whose tokens are ours.

A token counts only if the name of its weights equals, letter for letter, that of a policy which this process
made the server adopt. A server that was restarted, or that another run has used, is given the right weights
again and only then believed.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ratchet import weights
from ratchet.log import LOGGER
from ratchet.orchestrator.client import Client, PauseMode, Span
from ratchet.paths import RunPaths
from ratchet.weights import Policy


class Served:
    """The policy of the server. `generation` counts how often weights were given to it."""

    def __init__(self, client: Client, paths: RunPaths, *, is_exact: bool) -> None:
        self._client = client
        self._paths = paths
        self._is_exact = is_exact
        self._mode: PauseMode = "wait" if is_exact else "keep"
        self._steps: dict[str, int] = {}
        self._lock = asyncio.Lock()
        self._policy: Policy | None = None
        self.generation = 0
        self.reconciled = 0

    @property
    def step(self) -> int:
        """The step of the adopted policy; -1 before the first adoption."""
        return -1 if self._policy is None else self._policy.step

    @property
    def name(self) -> str:
        """The adopted policy by its full name; empty before the first adoption."""
        return "" if self._policy is None else str(self._policy)

    def _directory(self, policy: Policy) -> Path:
        return self._paths.weight(policy.step)

    async def adopt(self, policy: Policy) -> None:
        """Make the server hold `policy`, whatever it holds now. Raises: Refusal, RatchetError."""
        async with self._lock:
            # Named before the update: in-flight rollouts may return its tokens before this call does.
            self._steps = {} if self._is_exact else self._steps
            self._steps[str(policy)] = policy.step
            await self._client.adopt(str(policy), self._directory(policy), self._mode)
            self._policy = policy
            self.generation += 1

    async def reconcile(self, generation: int) -> None:
        """Give the server its policy again, once for all rollouts that noticed strange tokens."""
        async with self._lock:
            if self.generation != generation or self._policy is None:
                return
            LOGGER.warning("the server answered with other weights: it is given policy %d again", self.step)
            # Where a replay is not bitwise, a trainer that was restarted has published this step under another digest.
            held = self._policy
            there = (
                weights.read_policy(self._paths, held.step, run_id=held.run_id, lineage=held.lineage) or held
            )
            self._steps[str(there)] = there.step
            await self._client.adopt(str(there), self._directory(there), self._mode)
            self._policy = there
            self.generation += 1
            self.reconciled += 1

    def steps_of(self, spans: Sequence[Span], only: int | None = None) -> list[int] | None:
        """The policy of each span; None if any is not ours, or not `only`."""
        steps = []
        for span in spans:
            step = self._steps.get(span.version)
            if step is None or (only is not None and step != only):
                return None
            steps.append(step)
        return steps
