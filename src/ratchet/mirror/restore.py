"""An empty run directory gets its run back from the mirror.

    choose     the newest entry of the newest lineage, or the step that was asked for
    fetch      every file into a workshop, each compared with the manifest
    place      published directories, rows, ledger ─► last of all attempts/, by one rename

A directory without attempts/ is one without a run: a start that dies inside begins again, and finds in place what was
placed. What is restored then continues by the ordinary way, as a run that stopped at that step.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from ratchet import attempts, checkpoint, config_io, durable
from ratchet.attempts import KINDS, Outcome, Plan, Record, Restored
from ratchet.config import RunConfig
from ratchet.durable import MANIFEST
from ratchet.errors import EXIT_STOPPED, Damaged, Refusal
from ratchet.log import LOGGER
from ratchet.mirror import store as stores
from ratchet.mirror.store import Entry, Store
from ratchet.paths import RunPaths, step_name
from ratchet.stage import Stage

ROLE = "restore"
NOT_MIRRORED = {
    "sft": "Not mirrored, so gone with the disk: logs, and what came after step {step}, which is trained again.",
    "rl": "Not mirrored, so gone with the disk: batches, the journal, logs, and what came after step {step}. Up to "
    "there the ledger and the rows stand for the batches; `trainer --replay` begins there; rollouts that were "
    "finished later are sampled again.",
}
"""What a person is told, by the kind of the run."""

Check = Callable[[Record, RunConfig], int | None]
"""Refuses a command that may not continue a run; otherwise the step that it asks for, None for the newest."""


def restore(paths: RunPaths, number: int, config: RunConfig, check: Check) -> None:
    """Bring the run of `config.ckpt.mirror` back into a directory that holds none; nothing if it holds none either.

    `number` is above every attempt's that the directory ever had.
    Raises: Refusal if the mirror cannot be read, or what it holds may not be continued by this command; Damaged.
    """
    assert config.ckpt is not None
    assert config.ckpt.mirror is not None
    store = Store(config.ckpt.mirror)
    entries = _read(store)
    if not entries:
        return
    newest = entries[-1]
    record, old = _record(store, newest, config)
    asked = check(record, old)
    chosen = _choose(store, entries, asked)
    stage = Stage.open(paths, attempts.token(number, ROLE, 0))
    try:
        _bring(stage, store, chosen, config)
    finally:
        shutil.rmtree(stage.directory, ignore_errors=True)


def look(store: Store) -> list[Entry]:
    """The entries that lead to the newest state, in order. A damaged manifest is said and not believed."""
    entries, problems = store.entries()
    for problem in problems:
        LOGGER.warning("%s", problem)
    return stores.line(entries)


def _read(store: Store) -> list[Entry]:
    try:
        return look(store)
    except Exception as error:  # whatever the store's client raises
        raise Refusal(
            f"The mirror {store.url} cannot be read ({error!r}), and nothing is here, so whether there is a run to "
            "restore is not known: make it reachable, or begin a new run without --ckpt.mirror."
        ) from None


def _record(store: Store, entry: Entry, config: RunConfig) -> tuple[Record, RunConfig]:
    """The newest attempt in an entry, and its configuration as if it had been for this directory. Raises: Damaged"""
    folder = f"attempts/{entry.origin.record:03d}"
    record = attempts.decode(
        store.get_bytes(entry, f"{folder}/{attempts.RECORD}"), f"{store.url}/{entry.name}/{folder}"
    )
    data = store.get_bytes(entry, f"{folder}/run.toml")
    old = config_io.parse_toml(KINDS[record.kind], data, f"{store.url}/{entry.name}/{folder}/run.toml")
    return record, old.model_copy(update={"output_dir": config.output_dir})


def _choose(store: Store, entries: list[Entry], asked: int | None) -> list[Entry]:
    """The entry to restore, and those before it. Raises: Refusal if there is none of the step."""
    if asked is None:
        return entries
    steps = [entry.step for entry in entries]
    if asked not in steps:
        raise Refusal(
            f"The mirror {store.url} has no checkpoint of step {asked}; there are: {', '.join(map(str, steps))}."
        )
    return entries[: steps.index(asked) + 1]


def _bring(stage: Stage, store: Store, entries: list[Entry], config: RunConfig) -> None:
    """Fetch and place the last of `entries`; with `--ckpt.on-corrupt fallback` the one before, if it is damaged."""
    assert config.ckpt is not None
    *older, entry = entries
    held = ", ".join(str(e.step) for e in entries)
    LOGGER.info(
        "There is no run in %s; its mirror %s holds steps %s: restoring step %d, %.1f MB.",
        *(stage.paths.root, store.url, held, entry.step, entry.size_bytes / 1e6),
    )
    try:
        fetched = _fetch(stage, store, entry)
    except Damaged as error:
        if config.ckpt.on_corrupt == "stop" or not older:
            instead = (
                f" An older step may be sound: --ckpt.on-corrupt fallback restores step {older[-1].step}."
            )
            raise Damaged(f"{error}{instead if older else ''}") from None
        LOGGER.warning("%s Step %d is restored instead.", error, older[-1].step)
        _bring(stage, store, older, config)
        return
    _place(stage, store, entry, fetched, config)
    LOGGER.info("%s", NOT_MIRRORED[entry.origin.kind].format(step=entry.step))


def _fetch(stage: Stage, store: Store, entry: Entry) -> Path:
    """Every file of an entry, on our disk and verified. Raises: Damaged."""
    directory = stage.begin(f"{ROLE}_{entry.step}")
    for file in entry.manifest.files:
        store.get(entry, file, directory / file.name)
    for path in directory.glob(f"*/*/{MANIFEST}"):
        durable.check_sizes(path.parent, durable.read_manifest(path.parent))
    return directory


def _place(stage: Stage, store: Store, entry: Entry, fetched: Path, config: RunConfig) -> None:
    """Put what was fetched under its names; the rename of attempts/ makes it a run."""
    paths, there = stage.paths, RunPaths(fetched)
    for root in ("weights", "evals", "checkpoints"):
        (paths.root / root).mkdir(exist_ok=True)
        for directory in sorted((fetched / root).glob("step_*")):
            _replace(stage, directory, paths.root / root / directory.name)
    for source in (*there.metrics.glob("*.jsonl"), *there.ledger.parent.glob("*.jsonl")):
        target = paths.root / source.relative_to(fetched)
        target.parent.mkdir(exist_ok=True)
        _replace(stage, source, target)
    _add_record(stage.paths, store, entry, there, config)
    _replace(stage, there.attempts, paths.attempts)


def _replace(stage: Stage, source: Path, target: Path) -> None:
    """Move a fetched directory to its place; what an earlier try of this put there was not believed yet."""
    if target.exists():
        stage.remove(target)
    for folder in (*(p for p in source.rglob("*") if p.is_dir()), source):
        durable.fsync_path(folder)
    stage.move(source, target)


def _add_record(paths: RunPaths, store: Store, entry: Entry, there: RunPaths, config: RunConfig) -> None:
    """One more attempt, which stopped at the restored step; of a new lineage, because other steps may have followed."""
    record, old = _record(store, entry, config)
    stated = checkpoint.inputs(paths, entry.step)
    number = 1 + max(attempts.numbers(there))
    data = config_io.to_toml(old)
    there.attempt(number).mkdir()
    (there.attempt(number) / "run.toml").write_bytes(data)
    durable.fsync_path(there.attempt(number) / "run.toml")
    there.staging.mkdir()
    stage = Stage.open(there, attempts.token(number, ROLE, 0))
    attempts.write(
        stage,
        Record(
            attempt=number,
            kind=record.kind,
            run_id=record.run_id,
            lineage=record.lineage + 1,
            argv=attempts.argv(),
            resume_step=None,
            plan=Plan(
                step=entry.step,
                from_checkpoint=True,
                next_batch=entry.step if record.kind == "rl" else 0,
                messages=(f"Restored {step_name(entry.step)} from {store.url}.",),
            ),
            applied=True,
            outcome=Outcome(EXIT_STOPPED, f"restored from {store.url}/{entry.name}"),
            environment=record.environment,
            inputs=msgspec.UNSET if stated is None else stated,
            fingerprints=record.fingerprints,
            restored=Restored(store.url, entry.name, entry.step),
            config_xxh3=durable.hash_bytes(data),
        ),
    )
