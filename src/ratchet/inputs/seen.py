"""What a start or a program has found of its inputs, held against what the run is known to read.

    attempts/003/record.json              what the launcher saw, and what was accepted
    attempts/003/<program>/inputs.json    what only that program could see: its own machine, a module imported late

Crash: a note is replaced whole; one that was not written is written again before what it names is used.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ratchet.attempts import Assignment, Record
from ratchet.errors import Damaged
from ratchet.inputs.tree import CODE, LATE, Accepted, InputChanged, Inputs, Tree, inputs, merged, reconcile
from ratchet.paths import INPUTS, RunPaths


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What one program adds to its attempt's record."""

    groups: Tree = {}
    accepted: tuple[Accepted, ...] = ()


def known(paths: RunPaths, record: Record) -> Inputs:
    """The inputs of an attempt: its record's, with what its programs have noted. Raises: Damaged"""
    return with_notes(paths, record.attempt, Inputs() if record.inputs is msgspec.UNSET else record.inputs)


def with_notes(paths: RunPaths, attempt: int, found: Inputs) -> Inputs:
    """What an attempt's record says, with what its programs have noted. Raises: Damaged"""
    for path in sorted(paths.attempt(attempt).glob(f"*/{INPUTS}")):
        try:
            note = msgspec.json.decode(path.read_bytes(), type=Note)
        except (UnicodeDecodeError, msgspec.MsgspecError) as error:
            raise Damaged(f"{path} cannot be read ({error}): what its program read is not known.") from None
        found = inputs(merged(found.groups, note.groups), (*found.accepted, *note.accepted))
    return found


def copy(source: Path, target: Path) -> None:
    """The notes of one attempt's directory, into another's."""
    for path in sorted(source.glob(f"*/{INPUTS}")):
        (target / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.parent.name / INPUTS)


class Seen:
    """Grows by what is found. `inputs` are those that are known so far."""

    def __init__(
        self, known: Inputs, *, accepts: Iterable[str] = (), step: int = 0, needs_weights: bool = True
    ) -> None:
        self.before = self.inputs = known
        self.needs_weights = needs_weights
        """Whether the weights that the run began with are read again."""
        self._accepts = tuple(accepts)
        self._step = step

    def add(self, tree: Tree) -> None:
        """Raises: InputChanged if it is not what is known, and that is not accepted"""
        self.inputs = reconcile(self.inputs, tree, accepts=self._accepts, step=self._step)


class Guard(Seen):
    """The hand of a program of an open attempt: every incarnation holds what it reads against the record."""

    def __init__(self, run: Assignment, name: str, *, writes: bool = True) -> None:
        """`writes` says whether this process notes what is new: of several ranks one. Raises: Damaged"""
        super().__init__(
            with_notes(run.paths, run.attempt, run.inputs),
            accepts=run.config.accept_changes,
            step=max(run.plan.step, run.plan.next_batch),
        )
        self._run, self._path = run, run.paths.attempt(run.attempt) / name / INPUTS
        self._writes = writes
        self.problem: InputChanged | None = None
        """A module that was refused: user code may have swallowed the refusal."""

    def add(self, tree: Tree) -> None:
        before = self.inputs
        super().add(tree)
        if self._writes and self.inputs != before:
            self._note()

    def see_module(self, leaf: str, value: str) -> None:
        """A module of the user, just before it runs. Raises: InputChanged"""
        group = CODE if leaf in self.inputs.groups.get(CODE, {}) else LATE
        leaves = self.inputs.groups.get(group, {})
        try:
            if leaf in leaves:
                super().add({group: {**leaves, leaf: value}})
            else:
                self.inputs = inputs(merged(self.inputs.groups, {LATE: {leaf: value}}), self.inputs.accepted)
                self._note()
        except InputChanged as error:
            self.problem = error
            raise

    def check(self) -> None:
        """Raises: InputChanged if any module was refused"""
        if self.problem is not None:
            raise self.problem

    def _note(self) -> None:
        groups = {n: g for n, g in self.inputs.groups.items() if self._run.inputs.groups.get(n) != g}
        accepted = tuple(entry for entry in self.inputs.accepted if entry not in self._run.inputs.accepted)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        data = msgspec.json.format(msgspec.json.encode(Note(groups=groups, accepted=accepted)), indent=1)
        self._run.stage.replace(self._path, data)
