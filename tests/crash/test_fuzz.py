"""Damage anywhere: one flipped bit or a cut in any file that a run relies on is found before the file is used."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ratchet import attempts, durable
from ratchet.errors import Damaged
from ratchet.paths import RunPaths

TOY = Path(__file__).with_name("toy.py")
CASES = 500


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "run"
    command = [sys.executable, str(TOY), str(root), "4", "--ckpt.interval", "2"]
    subprocess.run(command, check=True, capture_output=True)
    return root


def victims(root):
    """Every file that is hashed, with the reader that must notice."""
    paths = RunPaths(root)
    for kind in (paths.checkpoints, paths.batches, paths.weights):
        for step in durable.steps(kind):
            directory = kind / f"step_{step}"
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                yield path, lambda d=directory: durable.verify(d)
    for number in attempts.numbers(paths):
        record = paths.attempt(number) / attempts.RECORD
        yield record, lambda n=number: attempts.read(paths, n)
        config = paths.attempt(number) / "run.toml"
        yield config, lambda n=number: attempts.read_config(paths, attempts.read(paths, n))


def damage(path, rng):
    """Flip a bit or cut the file; says what was done."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if rng.random() < 0.8:
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        return f"bit flipped at byte {at} of {path}"
    path.write_bytes(data[:at])
    return f"{path} cut at byte {at}"


def is_noticed(read):
    try:
        read()
    except Damaged:
        return True
    return False


def test_every_flip_and_every_cut_is_found_before_use(run):
    rng, kinds = random.Random(11), set()
    for _ in range(CASES):
        path, read = rng.choice(list(victims(run)))
        good = path.read_bytes()
        what = damage(path, rng)
        assert is_noticed(read), f"not noticed: {what}"
        path.write_bytes(good)
        read()
        kinds.add(path.relative_to(run).parts[0])
    assert kinds == {"checkpoints", "batches", "weights", "attempts"}


def test_a_missing_file_is_found_before_use(run, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(run, root)
    for path, read in victims(root):
        data = path.read_bytes()
        path.unlink()
        assert is_noticed(read), f"not noticed: {path} is missing"
        path.write_bytes(data)
