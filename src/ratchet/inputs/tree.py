"""The names of a run's inputs: one tree of content hashes, what was accepted of its changes, and one digest of both.

    env.code   reward.py            90ac12...      a group, its leaves, the xxh3-128 of each one's bytes
               helpers/units.py     5d01ff...
    tokenizer  tokenizer.json       0a77c1...

Identity is content: never a path, a size or a time. A leaf is called as the file is, below the place from which it is
found; where the file lies is nobody's business. Pure: no I/O.
"""

import re
from collections.abc import Iterable, Mapping

import msgspec

from ratchet.durable import hash_bytes
from ratchet.errors import Refusal

Leaves = dict[str, str]
Tree = dict[str, Leaves]

WEIGHTS = "model.weights"
CONFIG = "model.config"
LATE = "env.late"
"""Modules that nobody could foresee: user code named them while it ran."""
CODE = "env.code"
_POLICY = {WEIGHTS, CONFIG}
"""What every policy of a run is made from: a change of it cannot be accepted."""
_SHORT = 6
_HASH = re.compile(r"[0-9a-f]{32}")
_ACCEPTED = re.compile(rf"([\w.]+)=([0-9a-f]{{{_SHORT},32}})")


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A change of one group that the user has accepted."""

    group: str
    step: int
    """It holds from this batch on; of SFT, from this step on."""
    old: Leaves
    new: Leaves

    def __str__(self) -> str:
        return f"from batch {self.step} on: {said(changed(self.old, self.new))}"


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What a run reads, as an attempt's record and a checkpoint's manifest hold it."""

    digest: str = ""
    groups: Tree = {}
    accepted: tuple[Accepted, ...] = ()


class InputChanged(Refusal):
    """An input is not what this run was begun with. Nothing was made with it."""


def short(value: str) -> str:
    """A hash as people read it; a version is short already."""
    return " ".join(part[:_SHORT] if _HASH.fullmatch(part) else part for part in value.split(" "))


def value_of(leaves: Mapping[str, str]) -> str:
    """The hash of one group."""
    return hash_bytes(msgspec.json.encode(sorted(leaves.items())))


def inputs(groups: Tree, accepted: Iterable[Accepted] = ()) -> Inputs:
    """A tree with its digest. When a late module was first met is a matter of moments, so it counts once accepted."""
    accepted = tuple(accepted)
    counted = {name: leaves for name, leaves in groups.items() if name != LATE}
    if late := [entry.new for entry in accepted if entry.group == LATE]:
        counted[LATE] = late[-1]
    values = [(name, value_of(leaves)) for name, leaves in sorted(counted.items())]
    return Inputs(digest=hash_bytes(msgspec.json.encode(values)), groups=groups, accepted=accepted)


def merged(one: Tree, other: Tree) -> Tree:
    """Both trees; of a group that is in both, the second; late modules are added up."""
    late = {**one.get(LATE, {}), **other.get(LATE, {})}
    return {**one, **other} | ({LATE: late} if late else {})


def changed(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The leaves that are not the same, with what they were and are."""
    names = sorted({*old, *new})
    return {n: (old.get(n, "nothing"), new.get(n, "nothing")) for n in names if old.get(n) != new.get(n)}


def said(changes: Mapping[str, tuple[str, str]]) -> str:
    return ", ".join(f"{name} {short(old)} -> {short(new)}" for name, (old, new) in changes.items())


def undone(known: Inputs, *, at: int, is_rollback: bool) -> Inputs:
    """The names that held before batch `at`: what was accepted later goes, and the older name is back.

    Where only the log is cut, a change that was accepted for batch `at` itself holds still.
    """
    groups, kept = dict(known.groups), list(known.accepted)
    for entry in reversed(known.accepted):
        if entry.step > at or (is_rollback and entry.step == at):
            groups[entry.group] = entry.old
            kept.remove(entry)
    return inputs(groups, kept)


def parse_accepted(values: Iterable[str]) -> dict[str, list[str]]:
    """`GROUP=VALUE`, as a refusal prints it, by group. Raises: Refusal"""
    found: dict[str, list[str]] = {}
    for text in values:
        match = _ACCEPTED.fullmatch(text)
        if match is None:
            raise Refusal(
                f"--accept-changes {text!r} is not of the form GROUP=VALUE, such as env.code=90ac12: the refusal of a "
                "changed input prints it."
            )
        found.setdefault(match[1], []).append(match[2])
    return found


def reconcile(known: Inputs, found: Tree, *, accepts: Iterable[str] = (), step: int = 0) -> Inputs:
    """What is known with what was found now; a group that nobody knew is taken as it is.

    Raises: InputChanged if a known group has other content, and the user has not accepted just that
    """
    wanted = parse_accepted(accepts)
    groups, accepted, refused = dict(known.groups), list(known.accepted), []
    for name, leaves in found.items():
        old = known.groups.get(name)
        if old is not None and old != leaves:
            if name in _POLICY or not any(value_of(leaves).startswith(v) for v in wanted.get(name, ())):
                refused.append(name)
            accepted.append(Accepted(group=name, step=step, old=old, new=leaves))
        groups[name] = leaves
    if refused:
        raise InputChanged(refusal(known, found, refused, step))
    return inputs(groups, accepted)


def refusal(known: Inputs, found: Tree, names: Iterable[str], step: int) -> str:
    """What changed, from what to what, and the ways out."""
    names = list(names)
    what = "; ".join(f"{name} ({said(changed(known.groups[name], found[name]))})" for name in names)
    head = f"An input of this run is not what it was: {what}. Put it back"
    if _POLICY & {*names}:
        return f"{head}, or start a new run with another --output-dir: every policy of this run was made from it."
    values = " ".join(f"{name}={value_of(found[name])[:_SHORT]}" for name in names)
    return (
        f"{head}, start a new run with another --output-dir (or `ckpt fork` one from a checkpoint), or accept the "
        f"change from batch {step} on with --accept-changes {values}"
    )
