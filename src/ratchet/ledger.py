"""The ledger: which draw was trained in which batch, which was dropped why, and the digest of each batch, for ever.

    ledger/ledger.jsonl    one line a batch, chained: each line's hash covers the line and the hash before it

A line is born inside its batch: it is a function of samples and state, so one that was not appended before a
crash is appended at the next start. Batches go when nothing needs them; their lines stay.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ratchet import batchlog, durable
from ratchet.errors import Damaged
from ratchet.paths import RunPaths
from ratchet.records import Manifest, Progress, Sample
from ratchet.stage import Stage

_BLOCK_BYTES = 1 << 12


class Trained(msgspec.Struct, frozen=True, array_like=True):
    """One draw that a batch trains on, with the number of its samples."""

    draw: int
    env: str
    task: str
    samples: int


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one batch holds and did with the draws. `step` is the batch: it leads to policy step + 1."""

    step: int
    trained: list[Trained]
    dropped: list[tuple[int, str]]
    """(draw, reason) of those dropped since the batch before."""
    next_draw: int
    """Every draw below was made by the time of this batch."""
    tokens: int
    payload: str = ""
    """Of the batch's samples and state (`batchlog.payload`): what it was stays proved when it is gone. Empty in lines
    that were written before there was this field."""
    inputs: str = ""
    """Digest of what the run read when it made this batch; empty in lines before there was this field."""
    hash: str

    @property
    def samples(self) -> int:
        return sum(group.samples for group in self.trained)


class RunningDraw(msgspec.Struct, frozen=True):
    draw: int
    env: str


class ReadyGroup(msgspec.Struct, frozen=True):
    draw: int
    samples: list[Sample]


class DrawnEnv(msgspec.Struct, frozen=True):
    label: str
    drawn: int = 0


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the orchestrator's state that says what became of the draws."""

    progress: Progress = msgspec.field(default_factory=Progress)
    next_draw: int = 0
    envs: list[DrawnEnv] = []
    running: list[RunningDraw] = []
    ready: list[ReadyGroup] = []
    dropped: dict[str, int] = {}
    drops_of_batch: list[tuple[int, str]] = []
    drops_since: list[tuple[int, str]] = []
    inputs: str = ""


def read_state(data: bytes) -> State:
    """Raises: Damaged."""
    try:
        return msgspec.json.decode(data, type=State)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Damaged(f"An orchestrator's state does not parse ({error}).") from None


def line(manifest: Manifest, samples: list[Sample], state: bytes) -> Line:
    """The line of a batch, not chained yet: a function of what it holds."""
    after = read_state(state)
    sizes = Counter(sample.draw for sample in samples)
    first = {sample.draw: sample for sample in reversed(samples)}
    return Line(
        step=manifest.step,
        trained=[Trained(draw, first[draw].env, first[draw].task, sizes[draw]) for draw in sorted(sizes)],
        dropped=sorted(after.drops_of_batch),
        next_draw=after.next_draw,
        tokens=sum(len(sample.token_ids) for sample in samples),
        payload=batchlog.payload(manifest),
        inputs=after.inputs,
        hash="",
    )


def line_of(paths: RunPaths, step: int) -> Line:
    """The line of a batch that is still there, every byte of it verified. Raises: Damaged."""
    samples, manifest = batchlog.read(paths, step)
    state = (paths.batch(step) / batchlog.STATE).read_bytes()
    return line(manifest, samples, state)


def agrees(stated: Line, made: Line) -> bool:
    """Whether a line of the ledger is the one that was made from its batch again; an older one has no payload."""
    bare = msgspec.structs.replace(stated, hash="")
    return bare == (made if stated.payload else msgspec.structs.replace(made, payload=""))


def chained(entry: Line, before: str) -> Line:
    """The line with its hash; `before` is the hash of the line before, empty for the first."""
    bare = msgspec.structs.replace(entry, hash="")
    return msgspec.structs.replace(
        bare, hash=durable.hash_bytes(before.encode() + b"\n" + msgspec.json.encode(bare))
    )


def encode(entry: Line) -> bytes:
    """The canonical bytes of a line: a reader accepts these and no others, so that every byte counts."""
    return msgspec.json.encode(entry) + b"\n"


def append(stage: Stage, entry: Line) -> None:
    """Add the line of a batch that was just published.

    It is flushed at once: the batch may be deleted later, and then the line is all there is.
    """
    path = stage.paths.ledger
    path.parent.mkdir(exist_ok=True)
    stage.append(path, encode(chained(entry, _last_hash(path))))
    durable.fsync_path(path)


def _last_hash(path: Path) -> str:
    """What the next line is chained to: of a last line that is damaged, whatever it is, the hash of its bytes."""
    data = _tail(path)
    if not data:
        return ""
    try:
        return msgspec.json.decode(data, type=Line).hash
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return durable.hash_bytes(data)


def _tail(path: Path) -> bytes:
    """The last whole line, read from the end of the file."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        start = end = file.seek(0, os.SEEK_END)
        data = b""
        while start > 0 and data.count(b"\n") < 2:
            start = max(0, start - (end - start or _BLOCK_BYTES))
            file.seek(start)
            data = file.read(end - start)
    whole = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    return whole[-1] if whole else b""


def raw_lines(path: Path) -> list[bytes]:
    """All whole lines, as they are; a torn last line is not a line."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)


def checked(path: Path) -> Iterator[tuple[Line | None, str]]:
    """Each line, and what is wrong with it: empty for a line that is sound and chained to the one before."""
    before = ""
    for number, data in enumerate(raw_lines(path), start=1):
        try:
            entry = msgspec.json.decode(data, type=Line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            before = durable.hash_bytes(data)
            yield None, f"line {number} does not parse ({error})"
            continue
        is_sound = encode(entry) == data and chained(entry, before).hash == entry.hash
        before = entry.hash
        yield (
            entry,
            "" if is_sound else f"line {number} (batch {entry.step}) does not follow the line before it",
        )


def restore(stage: Stage, next_batch: int, *, aside: Path | None = None) -> None:
    """Make the ledger end where the log ends: lines past it are cut, a line that is missing is made from its batch.

    A rollback keeps what it cuts. Lines before the end are left as they are, also damaged ones: `ckpt audit` names
    them. The last one may be torn inside by a power cut, and is made again if its batch is there.
    Crash: what is cut is kept first; the cut is one replacement; each line is appended whole, or cut as torn later.
    """
    path = stage.paths.ledger
    lines = raw_lines(path)
    steps = list(_steps(lines))
    keep = next((index for index, step in enumerate(steps) if step >= next_batch), len(lines))
    cut = lines[keep:]
    if (
        keep
        and _parse(lines[keep - 1]) is None
        and durable.read_committed(stage.paths.batch(steps[keep - 1]))
    ):
        keep -= 1
    if cut and aside is not None:
        (aside / path.parent.name).mkdir(parents=True, exist_ok=True)
        stage.replace(aside / path.parent.name / path.name, b"".join(cut))
    if path.exists():  # always replaced: an older process that holds it open cannot add to the new one
        stage.replace(path, b"".join(lines[:keep]))
    for step in range(steps[keep - 1] + 1 if keep else 0, next_batch):
        try:
            entry = line_of(stage.paths, step)
        except Damaged:
            continue  # an older batch that no start relies on: the audit names the gap
        append(stage, entry)


def _steps(lines: list[bytes]) -> Iterator[int]:
    """The batch of each line; a damaged line counts as the one after its predecessor."""
    step = -1
    for data in lines:
        entry = _parse(data)
        step = step + 1 if entry is None else entry.step
        yield step


def _parse(data: bytes) -> Line | None:
    try:
        return msgspec.json.decode(data, type=Line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def lines_below(path: Path, next_batch: int) -> bytes:
    """The lines of the batches below `next_batch`, byte for byte: the chain stays what it is."""
    lines = raw_lines(path)
    return b"".join(data for data, step in zip(lines, _steps(lines), strict=True) if step < next_batch)


def chain_end(path: Path) -> str:
    """What the next line is chained to; empty without one."""
    return _last_hash(path)


def digest(path: Path) -> str:
    """Equal for two ledgers of the same lines, byte for byte; empty without one."""
    lines = raw_lines(path)
    return durable.hash_bytes(b"".join(lines)) if lines else ""


def payloads(path: Path) -> dict[int, str]:
    """By batch, the digest of what was in it, where its line is sound and holds one."""
    lines = (entry for entry, problem in checked(path) if entry is not None and not problem)
    return {entry.step: entry.payload for entry in lines if entry.payload}
