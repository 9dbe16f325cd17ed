"""Who waits for whom, derived from what is published: a pure function, so that it can be worked by hand.

    trainer         the orchestrator, for batch k      policy k is trained, and batch k is not published
                    the disk, for its last save        every batch is trained
    orchestrator    the trainer, for a policy          it may not run further ahead than max_async_level
                    inference, for answers             rollouts are in flight
                    inference, for an evaluation       no policy is adopted in the middle of one

docs/watching.md has the same table with what to do.
"""

import msgspec

SLOW_FACTOR = 10.0
SLOW_S = 60.0


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the run directory shows at one moment."""

    kind: str
    max_steps: int
    trained: int
    """The policy that the newest trainer row led to."""
    logged: int = 0
    """Batches 0 .. logged-1 are published, the next one is being made."""
    published: int = -1
    """The newest policy, in memory or below weights/."""
    served: int = -1
    max_async_level: int = 1
    saving: int | None = None
    evaluating: int | None = None
    in_flight: int = 0
    quiet_s: float = 0.0
    """Since anything was published or recorded."""
    usual_s: float = 0.0
    """The median time of a step."""


class Wait(msgspec.Struct, frozen=True):
    """One program that cannot go on alone."""

    who: str
    on: str
    why: str


def waits(facts: Facts) -> list[Wait]:
    """Every wait of this moment. The chain ends at a program that is working: it waits for nobody."""
    found = []
    is_trained = facts.trained >= facts.max_steps
    if is_trained and facts.saving is not None:
        found.append(Wait("trainer", "disk", f"checkpoint {facts.saving} is being written"))
    if facts.kind != "rl":
        return found
    if not is_trained and facts.logged <= facts.trained:
        found.append(Wait("trainer", "orchestrator", f"batch {facts.trained} is not published yet"))
    if facts.evaluating is not None:
        found.append(Wait("orchestrator", "inference", f"policy {facts.evaluating} is being evaluated"))
    elif facts.logged < facts.max_steps:
        needed = max(0, facts.logged - facts.max_async_level)
        if facts.published < needed:
            why = f"batch {facts.logged} needs policy {needed}, the newest is {facts.published}"
            found.append(Wait("orchestrator", "trainer", why))
        elif facts.in_flight:
            why = f"{facts.in_flight} rollouts are in flight for batch {facts.logged}"
            found.append(Wait("orchestrator", "inference", why))
    return found


def stall(facts: Facts) -> str | None:
    """A sentence if nothing has happened for much longer than a step usually takes; None otherwise."""
    limit = max(SLOW_S, SLOW_FACTOR * facts.usual_s)
    if facts.quiet_s <= limit:
        return None
    chain = [f"the {wait.who} waits for the {wait.on} ({wait.why})" for wait in waits(facts)]
    said = "; ".join(chain) if chain else "the trainer is inside a step"
    usual = f", a step usually takes {facts.usual_s:.1f} s" if facts.usual_s else ""
    return f"Nothing was published for {facts.quiet_s:.0f} s{usual}: {said}."
