"""Damage anywhere: one flipped bit or a cut in any file that a run relies on is found before the file is used."""

import random
import shutil

import msgspec
import pytest
import toy
from phases import KEEP_ALL, STEPS

from ratchet import attempts, durable, journal
from ratchet.audit import audit
from ratchet.errors import Damaged
from ratchet.journal import Journal
from ratchet.paths import RunPaths
from ratchet.stage import Stage

CASES = 500
KINDS = {"checkpoints", "batches", "weights", "evals", "attempts", "ledger", "journal"}


@pytest.fixture(scope="module")
def run(toys, tmp_path_factory):
    """A run whose second process died: each has left segments of the journal."""
    root = tmp_path_factory.mktemp("fuzz") / "run"
    for point in ("batch.committed:4", "batch.committed:2"):
        assert toys.run(root, *KEEP_ALL, steps=STEPS, crash_at=point).returncode == -9
    names = [path.name for path in journal.segments(RunPaths(root))]
    assert names == ["001.launcher.0-2.log", "001.launcher.0-3.log", "002.launcher.0-1.log"]
    return root


def victims(root):
    """Every file that is checked, by its kind, with the reader that must notice."""
    paths = RunPaths(root)
    found = {kind: [] for kind in KINDS}
    for kind in ("checkpoints", "batches", "weights", "evals"):
        for step in durable.steps(root / kind):
            directory = root / kind / f"step_{step}"
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                found[kind].append((path, lambda d=directory: durable.verify(d)))
    for number in attempts.numbers(paths):
        record = paths.attempt(number) / attempts.RECORD
        found["attempts"].append((record, lambda n=number: attempts.read(paths, n)))
        config = paths.attempt(number) / "run.toml"
        found["attempts"].append(
            (config, lambda n=number: attempts.read_config(paths, attempts.read(paths, n)))
        )
    found["ledger"].append((paths.ledger, lambda: check_ledger(paths)))
    found["journal"] += [(path, lambda: read_journal(paths)) for path in journal.segments(paths)]
    return found


def check_ledger(paths):
    """The audit, as something that raises."""
    if findings := audit(paths).findings:
        raise Damaged(str(findings[0]))


def read_journal(paths):
    """What the next process would use, encoded. Raises: Damaged."""
    own = Journal(Stage(paths, "reader"))
    own.restore(range(toy.EVER))
    return [msgspec.msgpack.encode(entry) for entry in own._found.values()]


def read_segment(path):
    return [msgspec.msgpack.encode(entry) for entry in journal.read(path, is_newest=True)]


def is_torn_tail(path, is_cut):
    """Whether a power cut could have left it so: the newest segment of a process, without its end."""
    process, _, number = path.stem.rpartition("-")
    is_newest = not path.with_name(f"{process}-{int(number) + 1}.log").exists()
    return is_newest and (is_cut or path.read_bytes()[-1] == 0)


def damage(path, rng):
    """Flip a bit or cut the file; says what was done, and whether it was a cut."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if rng.random() < 0.8:
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        return f"bit flipped at byte {at} of {path}", False
    path.write_bytes(data[:at])
    return f"{path} cut at byte {at}", True


def is_noticed(read):
    try:
        read()
    except Damaged:
        return True
    return False


def test_every_flip_and_every_cut_is_found_before_use(run):
    rng, everything = random.Random(11), victims(run)
    segments = {path: read_segment(path) for path, _ in everything["journal"]}
    finds, tears = dict.fromkeys(KINDS, 0), 0
    for _ in range(CASES):
        kind = rng.choice(sorted(KINDS))
        path, read = rng.choice(everything[kind])
        good = path.read_bytes()
        what, is_cut = damage(path, rng)
        if kind == "journal" and is_torn_tail(path, is_cut):
            # The torn entry does not come back; all that was before it does, to the byte.
            left = read_segment(path)
            assert left == segments[path][: len(left)], what
            assert len(left) < len(segments[path]), what
            others = [entry for other in segments if other != path for entry in segments[other]]
            assert sorted(read()) == sorted([*left, *others]), what
            tears += 1
        else:
            assert is_noticed(read), f"not noticed: {what}"
            finds[kind] += 1
        path.write_bytes(good)
        read()
    assert set(finds) == KINDS
    assert min(finds.values()) > 40, finds
    assert tears > 5


def test_a_missing_file_is_found_before_use(run, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(run, root)
    # A segment of the journal may be gone: that is how it is trimmed.
    found = [victim for kind, some in victims(root).items() if kind != "journal" for victim in some]
    assert len(found) > 30
    for path, read in found:
        data = path.read_bytes()
        path.unlink()
        assert is_noticed(read), f"not noticed: {path} is missing"
        path.write_bytes(data)
