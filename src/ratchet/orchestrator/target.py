"""Which policy the servers are to hold, and whose tokens are ours.

A token counts only if the name of its weights equals, letter for letter, that of a policy which this process made a
server adopt.
"""

from collections.abc import Sequence
from pathlib import Path

from ratchet.orchestrator.calls import PauseMode, Span
from ratchet.weights import Places, Policy


class Target:
    """The policy that every server is given before it is used. In exact mode no other one's tokens count."""

    def __init__(self, places: Places, *, is_exact: bool) -> None:
        self.places = places
        self._steps: dict[str, int] = {}
        self.is_exact = is_exact
        self.policy: Policy | None = None

    @property
    def mode(self) -> PauseMode:
        """What becomes of rollouts in flight when the weights change under them."""
        return "wait" if self.is_exact else "keep"

    @property
    def step(self) -> int:
        """The step of the policy; -1 before the first one."""
        return -1 if self.policy is None else self.policy.step

    @property
    def name(self) -> str:
        """The policy by its full name; empty before the first one."""
        return "" if self.policy is None else str(self.policy)

    def move(self, policy: Policy) -> None:
        # Named before any server has it: in-flight rollouts may return its tokens before an adoption is complete.
        self._steps = {} if self.is_exact else self._steps
        self._steps[str(policy)] = policy.step
        self.policy = policy

    def reread(self) -> Policy:
        """The policy as it is published now: where a replay is not bitwise, a trainer that was restarted has
        published this step under another digest."""
        held = self.policy
        assert held is not None
        there = self.places.read_policy(held.step, run_id=held.run_id, lineage=held.lineage) or held
        self._steps[str(there)] = there.step
        self.policy = there
        return there

    def directories(self, policy: Policy, *, on_disk: bool = False) -> list[Path]:
        """Where exactly this policy lies, the fastest way first, or only on the disk."""
        return (Places(self.places.disk) if on_disk else self.places).directories(policy)

    @property
    def is_on_disk(self) -> bool:
        """Whether exactly the target lies on the disk; one that a restarted trainer made anew may have another name."""
        return self.policy is not None and bool(self.directories(self.reread(), on_disk=True))

    def step_of(self, name: str) -> int | None:
        """The step of weights of this name; None if they are not ours."""
        return self._steps.get(name)

    def steps_of(self, spans: Sequence[Span], only: int | None = None) -> list[int] | None:
        """The policy of each span; None if any is not ours, or not `only`."""
        steps = []
        for span in spans:
            step = self.step_of(span.version)
            if step is None or (only is not None and step != only):
                return None
            steps.append(step)
        return steps
