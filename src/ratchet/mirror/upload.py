"""Checkpoints go to the mirror while the run goes on.

    trainer         offer(step) ─► a snapshot: hard links and a few small copies, so retention may do as it likes
    upload thread   files, each read back ─► manifest ─► retention in the mirror

One upload runs at a time, and at most one waits: a newer checkpoint takes the place of one that waits. Whatever goes
wrong is said, counted and tried again; nothing of it stops the run.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ratchet import attempts, batchlog, checkpoint, device_notes, durable, ledger, metrics
from ratchet.attempts import Assignment
from ratchet.config import CkptConfig, RLConfig
from ratchet.errors import RatchetError, Refusal
from ratchet.log import LOGGER
from ratchet.mirror import store as stores
from ratchet.mirror.store import Origin, Store
from ratchet.paths import RunPaths, step_name
from ratchet.records import FileEntry, Manifest

BACKOFF_S = 1.0
BACKOFF_MAX_S = 60.0
# When nothing but the upload keeps the run from its end.
LAST_TRIES = 3


@dataclass(frozen=True)
class Snapshot:
    """What an entry will hold, in the workshop of the trainer; laid out as a run directory."""

    directory: Path
    name: str
    manifest: Manifest


def take(run: Assignment, step: int) -> Snapshot:
    """Gather what must lie beside checkpoint `step`, before a retention lets go of any of it.

    Raises: Fenced; OSError; Damaged if the checkpoint, or the batch that led to it, is not sound.
    """
    source, config = run.paths, run.config
    directory = run.stage.begin(f"mirror_{step}")
    paths = RunPaths(directory)
    # Rows before evaluations: each row then has its evaluation, and one without a row is given it by the next start.
    _copy_lines(source, paths, step, is_rl=isinstance(config, RLConfig))
    entries = [*_describe(directory)]
    for root, steps in _wanted(config, step).items():
        for found, manifest in durable.committed(source.root / root).items():
            if found in steps:
                entries += _link(source.root / root / step_name(found), directory, root, manifest)
    for number in attempts.numbers(source):
        entries += _copy_attempt(source, paths, number)
    saved = durable.read_manifest(paths.checkpoint(step))
    origin = Origin(
        run_id=run.run_id,
        lineage=run.lineage,
        kind="rl" if isinstance(config, RLConfig) else "sft",
        record=run.attempt,
        checkpoint=saved.hash,
    )
    manifest = msgspec.structs.replace(
        saved, kind=stores.KIND, attempt=run.attempt, files=tuple(entries), meta=msgspec.to_builtins(origin)
    )
    return Snapshot(directory, stores.entry_name(step, run.lineage, entries), durable.signed(manifest))


def _wanted(config: object, step: int) -> dict[str, set[int]]:
    """Published directories by step: the checkpoint, what samples the first batches after it, what was evaluated.

    With evaluations one policy more: it may still be evaluated while the batches that it sampled are trained.
    """
    ahead = 0
    if isinstance(config, RLConfig):
        ahead = config.max_async_level + (config.orchestrator.eval is not None)
    return {
        "weights": set(range(step - ahead, step + 1)),
        "evals": set(range(step + 1)),
        "checkpoints": {step},
    }


def _link(source: Path, directory: Path, root: str, manifest: Manifest) -> list[FileEntry]:
    name = f"{root}/{source.name}"
    target = directory / name
    durable.link_tree(source, target)
    data = durable.encode_manifest(manifest)
    own = FileEntry(f"{name}/{durable.MANIFEST}", len(data), durable.hash_bytes(data))
    return [own, *(FileEntry(f"{name}/{file.name}", file.size, file.xxh3) for file in manifest.files)]


def _copy_lines(source: RunPaths, paths: RunPaths, step: int, *, is_rl: bool) -> None:
    """Rows up to policy `step`, the ledger of the batches below it; what the orchestrator still owes is made here."""
    paths.metrics.mkdir()
    for role in ("trainer", "orchestrator", "evals"):
        data = metrics.lines_until(source.metric(role), step)
        if role == "orchestrator" and is_rl and data.count(b"\n") < step:
            data += msgspec.json.encode(batchlog.read_metrics(source.batch(step - 1))) + b"\n"
        if data:
            paths.metric(role).write_bytes(data)
    if not is_rl:
        return
    paths.ledger.parent.mkdir()
    lines = ledger.lines_below(source.ledger, step)
    paths.ledger.write_bytes(lines)
    if lines.count(b"\n") < step:
        entry = ledger.chained(ledger.line_of(source, step - 1), ledger.chain_end(paths.ledger))
        paths.ledger.write_bytes(lines + ledger.encode(entry))


def _copy_attempt(source: RunPaths, paths: RunPaths, number: int) -> list[FileEntry]:
    target = paths.attempt(number)
    target.mkdir(parents=True)
    for name in (attempts.RECORD, "run.toml"):
        shutil.copyfile(source.attempt(number) / name, target / name)
    device_notes.copy(source.attempt(number), target)
    return [*_describe(paths.root, target)]


def _describe(directory: Path, below: Path | None = None) -> list[FileEntry]:
    return [
        FileEntry(str(path.relative_to(directory)), path.stat().st_size, durable.hash_file(path))
        for path in sorted((below or directory).rglob("*"))
        if path.is_file()
    ]


class Abandoned(Exception):
    """A newer checkpoint waits and the run is at its end: this one is not worth waiting for."""


class Uploader:
    """The mirror of one trainer."""

    def __init__(self, run: Assignment, url: str) -> None:
        self._run = run
        self._ckpt: CkptConfig = run.config.ckpt
        self._url = url
        self._store: Store | None = None
        self._change = threading.Condition()
        self._waiting: Snapshot | None = None
        self._is_closing = False
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, run: Assignment) -> "Uploader | None":
        """The mirror of a run that has one; the checkpoint that a death kept from it is offered first."""
        ckpt = run.config.ckpt
        if ckpt is None or ckpt.mirror is None:
            return None
        uploader = cls(run, ckpt.mirror)
        if run.plan.from_checkpoint:
            uploader.offer(run.plan.step)
        return uploader

    def offer(self, step: int) -> None:
        """Have a committed checkpoint uploaded; returns at once. Raises: Fenced."""
        try:
            snapshot = take(self._run, step)
        except (OSError, RatchetError) as error:
            self._run.stage.check()
            self._fail(f"checkpoint {step} could not be gathered for the mirror: {error}")
            return
        with self._change:
            skipped, self._waiting = self._waiting, snapshot
            self._change.notify_all()
        if skipped is not None:
            LOGGER.warning("checkpoint %d is not mirrored: %d came first", skipped.manifest.step, step)
            shutil.rmtree(skipped.directory, ignore_errors=True)

    def take_failures(self) -> int:
        """How often something failed since the last call."""
        with self._change:
            failures, self._failures = self._failures, 0
        return failures

    def close(self) -> None:
        """Wait for the newest upload, and for no other."""
        with self._change:
            self._is_closing = True
            self._change.notify_all()
        self._thread.join()

    def _fail(self, what: str) -> None:
        with self._change:
            self._failures += 1
        LOGGER.warning("%s", what)

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None or self._is_closing)
                snapshot, self._waiting = self._waiting, None
            if snapshot is None:
                return
            self._persist(snapshot)
            shutil.rmtree(snapshot.directory, ignore_errors=True)

    def _persist(self, snapshot: Snapshot) -> None:
        """Upload, and try again until it is there, a newer one waits, or the run is at its end."""
        step, last_tries, delay = snapshot.manifest.step, 0, BACKOFF_S
        while True:
            try:
                self._upload(snapshot)
                return
            except Abandoned:
                LOGGER.warning("checkpoint %d is not mirrored: a newer one is", step)
                return
            except Exception as error:  # whatever the store's client raises
                self._fail(f"checkpoint {step} could not be mirrored to {self._url}: {error!r}")
            with self._change:
                self._change.wait_for(lambda: self._waiting is not None or self._is_closing, delay)
                last_tries += self._is_closing
                if self._waiting is not None:
                    LOGGER.warning("checkpoint %d is not mirrored: a newer one takes its place", step)
                    return
            if last_tries >= LAST_TRIES:
                LOGGER.error("checkpoint %d is not mirrored; the next start of the run uploads it", step)
                return
            delay = BACKOFF_S if self._is_closing else min(2 * delay, BACKOFF_MAX_S)

    def _upload(self, snapshot: Snapshot) -> None:
        """Raises: Abandoned; RatchetError; whatever the store's client raises."""
        if self._store is None:
            self._store = Store(self._url)
        send(self._store, snapshot, lambda: self._is_closing and self._waiting is not None)
        retain(self._store, self._ckpt)
        LOGGER.info("checkpoint %d is mirrored at %s/%s", snapshot.manifest.step, self._url, snapshot.name)


def send(store: Store, snapshot: Snapshot, is_abandoned: Callable[[], bool] = lambda: False) -> None:
    """Upload one snapshot, its manifest last; a no-op where the checkpoint is there already.

    Raises: Abandoned; Refusal if the mirror holds another run; Damaged if it holds not what was written to it.
    """
    origin = msgspec.convert(snapshot.manifest.meta, Origin)
    for entry in store.entries()[0]:
        check_run(store, entry.origin.run_id, origin.run_id)
        there = (entry.step, entry.origin.lineage, entry.origin.checkpoint)
        if there == (snapshot.manifest.step, origin.lineage, origin.checkpoint):
            return
    for file in snapshot.manifest.files:
        if is_abandoned():
            raise Abandoned
        store.put(snapshot.directory / file.name, snapshot.name, file)
        durable.crash_point("mirror.after_file")
    durable.crash_point("mirror.before_manifest")
    store.commit(snapshot.name, snapshot.manifest)
    durable.crash_point("mirror.committed")


def check(url: str, run_id: str) -> None:
    """Before a start: a mirror that cannot be reached is said, and no reason not to go on.

    Raises: Refusal for an address that cannot be opened, or one that holds another run.
    """
    store = Store(url)
    try:
        entries, _ = store.entries()
    except Exception as error:  # whatever the store's client raises
        LOGGER.warning("The mirror %s cannot be read (%r): the run goes on without it.", url, error)
        return
    for entry in entries:
        check_run(store, entry.origin.run_id, run_id)


def check_run(store: Store, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise Refusal(
            f"The mirror {store.url} holds checkpoints of run {theirs}, this is run {ours}: give each run its own "
            "ckpt.mirror."
        )


def retain(store: Store, ckpt: CkptConfig) -> list[str]:
    """Delete what the rules do not keep, and uploads that did not end. Returns the names that went."""
    entries, _ = store.entries()
    if not entries:
        return []
    newest = max(entry.order for entry in entries)
    kept = {entry.name for entry in entries}
    rules = ckpt.model_copy(update={"keep_last": ckpt.mirror_keep_last or ckpt.keep_last})
    if rules.keep_last is not None or rules.keep_interval is not None:
        on_line = {entry.step: entry.name for entry in stores.line(entries)}
        kept = {on_line[step] for step in checkpoint.kept(list(on_line), rules)}
    gone = [entry.name for entry in entries if entry.name not in kept]
    gone += [name for name in store.torn() if stores.parse(name) <= newest]
    for name in gone:
        store.remove(name)
    return gone
