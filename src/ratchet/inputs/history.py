"""What the attempts of a run have recorded of its inputs, as those who look at a run read it. Nothing is written."""

from collections.abc import Iterable

from ratchet import attempts
from ratchet.errors import RatchetError
from ratchet.inputs import seen
from ratchet.inputs.tree import Inputs, short, undone, value_of
from ratchet.paths import RunPaths


def newest(paths: RunPaths) -> Inputs | None:
    """The inputs of the newest attempt; None where no version with names of inputs has begun one. Raises: Damaged"""
    record = attempts.newest(paths)
    found = Inputs() if record is None else seen.known(paths, record)
    return found if found.groups else None


def problems(paths: RunPaths, lines: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """The batches whose lines name inputs that cannot be, each with a sentence. `lines` has batch and digest, in order.

    Every digest is one that an attempt has recorded, and it changes only where an attempt has accepted a change.
    """
    recorded, changes = set[str](), set[int]()
    for number in attempts.numbers(paths):
        try:
            found = seen.known(paths, attempts.read(paths, number))
        except RatchetError:
            continue
        changes |= {entry.step for entry in found.accepted}
        before = [undone(found, at=entry.step, is_rollback=True) for entry in found.accepted]
        recorded |= {found.digest, *(older.digest for older in before)}
    wrong, last = [], ""
    for step, digest in lines:
        if digest and digest not in recorded:
            wrong.append(
                (step, f"batch {step} was made with inputs {short(digest)}, which no attempt has recorded.")
            )
        elif digest and last and digest != last and step not in changes:
            wrong.append(
                (step, f"from batch {step} on the inputs are others, and no attempt has accepted that.")
            )
        last = digest
    return wrong


def said(found: Inputs) -> dict[str, str]:
    """By group, the value that a refusal would print."""
    return {name: short(value_of(leaves)) for name, leaves in sorted(found.groups.items())}


def leaves(found: Inputs) -> dict[str, str]:
    """Each leaf by its full name, short as people read it."""
    return {
        f"{group}/{name}": short(value)
        for group, inner in sorted(found.groups.items())
        for name, value in sorted(inner.items())
    }
