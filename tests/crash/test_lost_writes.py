"""What a power cut may leave: every write, rename and deletion that no fsync had covered, kept or lost at random.

A run is recorded: after each system call that matters, the tree as programs see it, and the part of it that fsync has
made certain. A state of the disk takes each uncertain directory entry and each uncertain content in one of its
possible forms. Whatever comes out, what counts must be whole, nothing that was acknowledged may be missing, and the
same command continues the run to the same end.
"""

import os
import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import points
import pytest
import toy
from phases import FLAGS, PHASES, STEPS, kill

from ratchet import digest, durable, journal, ledger, resume
from ratchet.errors import Damaged
from ratchet.journal import Entry, Journal
from ratchet.paths import RunPaths
from ratchet.stage import Stage

STATES = 300
CONTINUED = 8
FALLBACK = ("--ckpt.resume-step", "-1", "--ckpt.on-corrupt", "fallback")
PUBLISHED = ("checkpoints", "batches", "weights", "evals")


@dataclass
class Snapshot:
    """The disk after one event: entries by directory (inode -> name -> inode), contents by inode."""

    root: int
    entries: dict
    certain_entries: dict
    contents: dict
    certain_contents: dict
    acknowledged: frozenset
    """(kind, what): a published directory, an entry of the journal that was synced, a line of the ledger."""
    written: frozenset
    """The entries that were handed to the journal, encoded."""


@dataclass
class Recorder:
    """Follows a run from inside its process."""

    root: Path
    fsync_counts: bool = True
    snapshots: list = field(default_factory=list)
    certain_entries: dict = field(default_factory=dict)
    certain_contents: dict = field(default_factory=dict)
    acknowledged: set = field(default_factory=set)
    unsynced: set = field(default_factory=set)
    written: set = field(default_factory=set)
    homes: dict = field(default_factory=dict)
    """The segment of each entry that was written."""

    def scan(self):
        entries, contents = {}, {}
        for directory, folders, files in os.walk(self.root):
            here = {}
            for name in (*folders, *files):
                path = Path(directory, name)
                here[name] = path.stat().st_ino
                if name in files:
                    contents[here[name]] = path.read_bytes()
            entries[Path(directory).stat().st_ino] = here
        return entries, contents

    def trust_what_is_there(self):
        self.certain_entries, self.certain_contents = self.scan()
        paths = RunPaths(self.root)
        names = (f"{kind}/step_{step}" for kind in PUBLISHED for step in durable.committed(self.root / kind))
        self.acknowledged |= {("published", name) for name in names}
        self.acknowledged |= {("line", line) for line in ledger.raw_lines(paths.ledger)}
        for path in journal.segments(paths):
            for entry in journal.read(path, is_newest=True):
                self.homes[msgspec.msgpack.encode(entry)] = path
        self.written |= set(self.homes)
        self.acknowledged |= {("entry", entry) for entry in self.homes}

    def look(self):
        entries, contents = self.scan()
        self.keep_replaced(entries, contents)
        for inode in {*self.certain_entries} - {*entries}:
            del self.certain_entries[inode]  # inode numbers are used again
        for inode in {*self.certain_contents} - {*contents}:
            del self.certain_contents[inode]
        self.snapshots.append(
            Snapshot(
                self.root.stat().st_ino,
                entries,
                {k: dict(v) for k, v in self.certain_entries.items()},
                contents,
                dict(self.certain_contents),
                frozenset(self.acknowledged),
                frozenset(self.written),
            )
        )

    def keep_replaced(self, entries, contents):
        """A name that is certain may still be that of a file which another one has replaced."""
        before = self.snapshots[-1].contents if self.snapshots else {}
        for names in self.certain_entries.values():
            for name, inode in names.items():
                if inode in before and inode not in contents:
                    if isinstance(inode, int):
                        names[name] = (inode, len(self.snapshots))
                        if inode in self.certain_contents:
                            self.certain_contents[names[name]] = self.certain_contents[inode]
                    contents[names[name]] = before[inode]

    def synced(self, inode):
        entries, contents = self.scan()
        if self.fsync_counts and inode in entries:
            left = set(self.certain_entries.get(inode, {}).values()) - set(entries[inode].values())
            self.certain_entries[inode] = entries[inode]
            self.complete_renames(inode, left, entries)
        elif self.fsync_counts and inode in contents:
            self.certain_contents[inode] = contents[inode]

    def complete_renames(self, synced, left, entries):
        """A rename is atomic: with one of its directories the other is certain too."""
        for directory, names in entries.items():
            if directory != synced:
                known = self.certain_entries.get(directory, {})
                known = {n: inode for n, inode in known.items() if inode not in entries[synced].values()}
                known |= {name: inode for name, inode in names.items() if inode in left}
                self.certain_entries[directory] = known

    def published(self, stage, directory, target, manifest):
        self.acknowledged.add(("published", str(target.relative_to(self.root))))

    def moved(self, stage, path, target):
        if target.is_dir():
            self.acknowledged.add(("published", str(target.relative_to(self.root))))

    def removing(self, stage, path, target=None):
        gone = {entry for entry, home in self.homes.items() if home == path}
        self.unsynced -= gone
        self.acknowledged -= {("entry", entry) for entry in gone}
        self.acknowledged.discard(("published", str(path.relative_to(self.root))))

    def appending(self, own, entry):
        self.unsynced.add(msgspec.msgpack.encode(entry))
        self.written.add(msgspec.msgpack.encode(entry))

    def wrote(self, own):
        self.homes |= {entry: own._live for entry in self.unsynced if entry not in self.homes}

    def kept(self, own):
        self.acknowledged |= {("entry", entry) for entry in self.unsynced}
        self.unsynced = set()

    def cutting(self, stage, next_batch):
        cut = [line for line in ledger.raw_lines(stage.paths.ledger) if step_of(line) >= next_batch]
        self.acknowledged -= {("line", line) for line in cut}

    def accounted(self, stage, line):
        self.acknowledged.add(("line", ledger.raw_lines(stage.paths.ledger)[-1]))

    def install(self, monkeypatch):
        def around(owner, name, *, before=lambda *args: None, after=lambda *args: None):
            real = getattr(owner, name)

            def call(*args, **kwargs):
                before(*args)
                result = real(*args, **kwargs)
                after(*args)
                self.look()
                return result

            monkeypatch.setattr(owner, name, call)

        around(os, "fsync", after=lambda fd: self.synced(os.fstat(fd).st_ino))
        for owner, names in (
            (os, ("rename", "mkdir", "rmdir", "unlink")),
            (Stage, ("append", "extend", "truncate")),
        ):
            for name in names:
                around(owner, name)
        around(Stage, "commit", after=self.published)
        around(Stage, "remove", before=self.removing)
        around(Stage, "move", before=self.removing, after=self.moved)
        around(ledger, "restore", before=self.cutting)
        around(Journal, "append", before=self.appending)
        around(Journal, "write", after=self.wrote)
        around(Journal, "sync", after=self.kept)
        around(ledger, "append", after=self.accounted)


def step_of(line):
    return msgspec.json.decode(line)["step"]


def record(root, monkeypatch, course, *, fsync_counts=True):
    """Follow what `course` does in the run directory `root`; what is there before is certain."""
    recorder = Recorder(root, fsync_counts)
    root.mkdir(exist_ok=True)
    recorder.trust_what_is_there()
    with monkeypatch.context() as patched:
        recorder.install(patched)
        course()
    return recorder.snapshots


def record_the_toy(folder, monkeypatch, calm, phase=points.FRESH, **more):
    shutil.copytree(calm(phase).start, folder)
    return follow_the_toy(folder, monkeypatch, PHASES[phase].flags, **more)


def follow_the_toy(folder, monkeypatch, flags, **more):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["toy", "run", str(STEPS), *flags])
    return record(Path("run"), monkeypatch, toy.main, **more)


def keep_a_journal(root):
    """Many entries in many segments, seldom synced."""
    paths, rng = RunPaths(root), random.Random(5)
    for directory in (paths.staging, paths.journal):
        directory.mkdir()
        durable.fsync_path(root)
    own = Journal(Stage.open(paths, "001.toy.0"), segment_bytes=600)
    for draw in range(30):
        for rollout in range(rng.randint(1, 3)):
            found = toy.sample(draw)
            own.append(Entry(env="toy", draw=draw, rollout=rollout, key="k", policy="", sample=found))
        own.write()
        if rng.random() < 0.3:
            own.sync()
        if draw % 8 == 7:
            own.trim(own.release(range(draw - 4, toy.EVER)))


def possible_content(snapshot, inode, rng):
    """What a file may hold, and whether later bytes are there while earlier ones are not.

    What was synced and what was written since: kept, lost, cut, cut and zeros instead, or zeros in its middle.
    """
    now, certain = snapshot.contents[inode], snapshot.certain_contents.get(inode, b"")
    if rng is None:
        return certain, False
    if not now.startswith(certain):
        return rng.choice([certain, now]), False
    start, end = sorted(rng.randint(len(certain), len(now)) for _ in range(2))
    zeroed = now[:start] + bytes(end - start)
    form = rng.randrange(5)
    if form == 4:
        return zeroed + now[end:], any(now[end:]) and now[start:end] != zeroed[start:]
    return [certain, now, now[:end], zeroed][form], False


def materialize(snapshot, target, rng):
    """Write one possible state of the disk; says whether an append has a hole in it.

    Without `rng` it is the worst one: everything that is not certain is lost.
    """
    holes = []
    here = {inode for names in snapshot.entries.values() for inode in names.values()}
    # By inode: a rename moves it as a whole.
    is_new = {inode: rng is not None and rng.random() < 0.5 for inode in sorted(here)}

    def choose(now, certain):
        if now == certain or (now is not None and is_new[now]):
            return now
        if certain in here:
            return None if is_new[certain] else certain
        return certain if now is not None or rng is None else rng.choice([certain, None])

    def fill(inode, directory):
        directory.mkdir(parents=True)
        now, certain = snapshot.entries[inode], snapshot.certain_entries.get(inode, {})
        for name in sorted({*now, *certain}):
            child = choose(now.get(name), certain.get(name))
            if child in snapshot.entries:
                fill(child, directory / name)
            elif child in snapshot.contents:
                content, has_hole = possible_content(snapshot, child, rng)
                holes.append(has_hole)
                (directory / name).write_bytes(content)

    # The run directory's own first entries are made before anything can be promised about them.
    fill(snapshot.root, target)
    return any(holes)


def states(snapshots, folder, seed, count=STATES):
    """Possible states of the disk, one after the other, each with the moment that it comes from."""
    rng = random.Random(seed)
    for index in range(count):
        root = folder / f"state_{index}" / "run"
        snapshot = rng.choice(snapshots)
        has_hole = materialize(snapshot, root, rng)
        yield root, snapshot, has_hole
        shutil.rmtree(root.parent)


def lies(root, snapshot, has_hole):
    """What is wrong with a state: something that counts and is not what it was, or was acknowledged and is gone."""
    found = []
    for kind in PUBLISHED:
        for step in durable.committed(root / kind):
            try:
                durable.verify(root / kind / f"step_{step}")
            except Damaged as error:
                found.append(str(error))
    resume.survey(RunPaths(root))  # whatever is there, listing it does not fail
    there = {("line", line) for line in ledger.raw_lines(root / "ledger" / "ledger.jsonl")}
    there |= {("published", name) for _, name in snapshot.acknowledged if is_published(root, name)}
    try:
        entries = read_journal(root)
        found += ["an entry is not what was written" for entry in entries if entry not in snapshot.written]
        there |= {("entry", entry) for entry in entries}
    except Damaged as error:
        if not has_hole:
            found.append(f"a power cut is taken for damage: {error}")
        there |= {
            fact for fact in snapshot.acknowledged if fact[0] == "entry"
        }  # moved aside only if asked to
    return found + [
        f"{kind} {what!r:.80} was acknowledged and is gone" for kind, what in snapshot.acknowledged - there
    ]


def is_published(root, name):
    return isinstance(name, str) and durable.read_committed(root / name) is not None


def read_journal(root):
    """What the next process reads, encoded. Raises: Damaged."""
    own = Journal(Stage(RunPaths(root), "reader"))
    own.restore(range(toy.EVER))
    return [msgspec.msgpack.encode(entry) for entry in own._found.values()]


def all_lies(snapshots, folder, seed):
    return [lie for state in states(snapshots, folder, seed) for lie in lies(*state)]


@pytest.mark.parametrize("phase", points.ALL)
def test_whatever_a_power_cut_loses_what_counts_is_whole_and_what_was_acknowledged_is_there(
    calm, tmp_path, monkeypatch, phase
):
    snapshots = record_the_toy(tmp_path / "recorded", monkeypatch, calm, phase)
    assert len(snapshots) > 200
    most = max((snapshot.acknowledged for snapshot in snapshots), key=len)
    assert {kind for kind, _ in most} == {"published", "entry", "line"}
    assert all_lies(snapshots, tmp_path, 1) == []


@pytest.mark.parametrize("seed", [2, 3])
def test_whatever_a_power_cut_loses_of_the_journal_the_rest_is_read_as_it_was_written(
    tmp_path, monkeypatch, seed
):
    root = tmp_path / "recorded"
    snapshots = record(root, monkeypatch, lambda: keep_a_journal(root))
    assert max(len(snapshot.acknowledged) for snapshot in snapshots) >= 10
    assert all_lies(snapshots, tmp_path, seed) == []


@pytest.mark.parametrize("at", ["batch.committed:5", "toy.before_row:7", "toy.before_eval_row:3"])
def test_of_a_run_that_has_ended_a_power_cut_takes_nothing(toys, calm, tmp_path, monkeypatch, at):
    folder = tmp_path / "recorded"
    folder.mkdir()
    kill(toys, folder / "run", *FLAGS, at=at)
    snapshots = follow_the_toy(folder, monkeypatch, FLAGS)
    materialize(snapshots[-1], tmp_path / "run", None)
    assert digest.parts(tmp_path / "run") == calm(points.FRESH).parts


def continue_from(count, toys, calm, tmp_path, monkeypatch, phase):
    """The same command on states of the disk; where a hole in the journal is refused, it is moved aside."""
    flags = PHASES[phase].flags
    snapshots = record_the_toy(tmp_path / "recorded", monkeypatch, calm, phase)
    for root, _, has_hole in states(snapshots, tmp_path, 4, count):
        done = toys.run(root, *flags, steps=STEPS)
        if has_hole and done.returncode == 2:
            assert "journal" in done.stderr
            done = toys.run(root, *flags[:4], *FALLBACK, steps=STEPS)
        assert done.returncode == 0, done.stderr
        assert digest.parts(root) == calm(phase).parts


@pytest.mark.parametrize("phase", points.ALL)
def test_from_what_a_power_cut_leaves_the_run_ends_the_same(toys, calm, tmp_path, monkeypatch, phase):
    continue_from(CONTINUED, toys, calm, tmp_path, monkeypatch, phase)


@pytest.mark.campaign
@pytest.mark.parametrize("phase", points.ALL)
def test_from_much_that_a_power_cut_leaves_the_run_ends_the_same(toys, calm, tmp_path, monkeypatch, phase):
    continue_from(STATES, toys, calm, tmp_path, monkeypatch, phase)


def test_without_fsync_the_simulation_finds_lies(calm, tmp_path, monkeypatch):
    snapshots = record_the_toy(tmp_path / "recorded", monkeypatch, calm, fsync_counts=False)
    found = all_lies(snapshots, tmp_path, 1)
    for what in ("published", "entry", "line"):
        assert any(lie.startswith(what) and "is gone" in lie for lie in found), what


def test_without_the_sync_of_the_journal_the_simulation_finds_lies(tmp_path, monkeypatch):
    root = tmp_path / "recorded"
    snapshots = record(root, monkeypatch, lambda: keep_a_journal(root), fsync_counts=False)
    assert any(lie.startswith("entry") for lie in all_lies(snapshots, tmp_path, 3))
