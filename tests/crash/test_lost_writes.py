"""What a power cut may leave: every write, rename and deletion that no fsync had covered, kept or lost at random.

The toy run is recorded: after each system call that matters, the tree as programs see it, and the part of it that
fsync has made certain. A crash state takes each uncertain directory entry and each uncertain content in one of its
possible forms. In whatever comes out, `committed()` must tell the truth and nothing acknowledged may be missing.
"""

import os
import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy

from ratchet import durable, resume
from ratchet.paths import RunPaths

STATES = 500
ARGUMENTS = ("5", "--ckpt.interval", "1", "--ckpt.keep-last", "2")
PUBLISHED = ("checkpoints", "batches", "weights")


@dataclass
class Snapshot:
    """The disk after one event: entries by directory (inode -> name -> inode), contents by inode."""

    root: int
    entries: dict
    certain_entries: dict
    contents: dict
    certain_contents: dict
    acknowledged: frozenset


@dataclass
class Recorder:
    """Follows a run from inside its process."""

    root: Path
    fsync_counts: bool = True
    snapshots: list = field(default_factory=list)
    certain_entries: dict = field(default_factory=dict)
    certain_contents: dict = field(default_factory=dict)
    acknowledged: set = field(default_factory=set)

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

    def look(self):
        entries, contents = self.scan()
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
            )
        )

    def synced(self, inode):
        entries, contents = self.scan()
        if self.fsync_counts and inode in entries:
            self.certain_entries[inode] = entries[inode]
        elif self.fsync_counts and inode in contents:
            self.certain_contents[inode] = contents[inode]

    def install(self, monkeypatch):
        def after(name, then):
            real = getattr(os, name)

            def call(*args, **kwargs):
                result = real(*args, **kwargs)
                then(*args)
                self.look()
                return result

            monkeypatch.setattr(os, name, call)

        after("fsync", lambda fd: self.synced(os.fstat(fd).st_ino))
        for name in ("rename", "mkdir", "rmdir", "unlink"):
            after(name, lambda *args: None)
        real_commit, real_remove = durable.Stage.commit, durable.Stage.remove

        def commit(stage, directory, target, manifest):
            done = real_commit(stage, directory, target, manifest)
            self.acknowledged.add(str(target.relative_to(self.root)))
            return done

        def remove(stage, path):
            self.acknowledged.discard(str(path.relative_to(self.root)))
            real_remove(stage, path)

        monkeypatch.setattr(durable.Stage, "commit", commit)
        monkeypatch.setattr(durable.Stage, "remove", remove)


def record(root, monkeypatch, *, fsync_counts=True):
    recorder = Recorder(root, fsync_counts)
    root.mkdir()
    monkeypatch.setattr(sys, "argv", ["toy", str(root), *ARGUMENTS])
    with monkeypatch.context() as patched:
        recorder.install(patched)
        toy.main()
    return recorder.snapshots


def possible_content(snapshot, inode, rng):
    """What a file may hold: what was synced, what was written, a part of it, or as many zeros."""
    now, certain = snapshot.contents[inode], snapshot.certain_contents.get(inode)
    if certain == now:
        return now
    torn = now[: rng.randint(0, len(now))]
    return rng.choice([b"" if certain is None else certain, now, torn, bytes(len(now))])


def materialize(snapshot, target, rng):
    """Write one possible state of the disk."""

    def fill(inode, directory):
        directory.mkdir()
        now, certain = snapshot.entries[inode], snapshot.certain_entries.get(inode, {})
        for name in {*now, *certain}:
            child = rng.choice([now.get(name), certain.get(name)])
            if child in snapshot.entries:
                fill(child, directory / name)
            elif child in snapshot.contents:
                (directory / name).write_bytes(possible_content(snapshot, child, rng))

    # The run directory's own first entries are made before anything can be promised about them.
    fill(snapshot.root, target)


def lies(target, acknowledged):
    """What is wrong with a state: a directory that counts and is not whole, or an acknowledged one that is gone."""
    found = []
    for kind in PUBLISHED:
        for step in durable.committed(target / kind):
            try:
                durable.verify(target / kind / f"step_{step}")
            except Exception as error:
                found.append(str(error))
    missing = [name for name in acknowledged if durable.read_committed(target / name) is None]
    return found + [f"{name} was acknowledged and is gone" for name in missing]


def all_lies(snapshots, tmp_path, seed):
    rng, found = random.Random(seed), []
    for index in range(STATES):
        target = tmp_path / f"state_{index}"
        snapshot = rng.choice(snapshots)
        materialize(snapshot, target, rng)
        found += lies(target, snapshot.acknowledged)
        resume.survey(RunPaths(target))  # whatever is there, listing it does not fail
        shutil.rmtree(target)
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_a_power_cut_loses_committed_tells_the_truth(tmp_path, monkeypatch, seed):
    snapshots = record(tmp_path / "run", monkeypatch)
    assert len(snapshots) > 200
    assert max(len(snapshot.acknowledged) for snapshot in snapshots) >= 6
    assert all_lies(snapshots, tmp_path, seed) == []


def test_without_fsync_the_simulation_finds_lies(tmp_path, monkeypatch):
    snapshots = record(tmp_path / "run", monkeypatch, fsync_counts=False)
    assert all_lies(snapshots, tmp_path, 1)
