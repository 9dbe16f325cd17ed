"""The commit protocol: what is published is whole, what is damaged is named, a fenced process publishes nothing."""

import errno
import io
import os
import random

import pytest

from ratchet import durable
from ratchet.errors import Damaged, Fenced, RatchetError
from ratchet.paths import RunPaths
from ratchet.records import Manifest
from ratchet.stage import GATE, Stage


@pytest.fixture
def paths(tmp_path):
    found = RunPaths(tmp_path / "run")
    for directory in (found.staging, found.checkpoints):
        directory.mkdir(parents=True)
    return found


@pytest.fixture
def stage(paths):
    return Stage.open(paths, "001.trainer.1")


def publish(stage, step, content=b"state"):
    directory = stage.begin(f"checkpoint_{step}")
    (directory / "trainer").mkdir()
    (directory / "trainer" / "shard").write_bytes(content)
    manifest = Manifest(kind="checkpoint", step=step, attempt=1, files=tuple(durable.seal(directory)))
    return stage.commit(directory, stage.paths.checkpoint(step), manifest)


def test_a_published_directory_is_committed_and_verifies(stage):
    publish(stage, 3)
    assert list(durable.committed(stage.paths.checkpoints)) == [3]
    manifest = durable.verify(stage.paths.checkpoint(3))
    assert [(f.name, f.size) for f in manifest.files] == [("trainer/shard", 5)]


def test_a_torn_directory_is_never_committed(stage):
    publish(stage, 3)
    torn = stage.paths.checkpoint(9)
    torn.mkdir()
    (torn / "shard").write_bytes(b"half")
    assert list(durable.committed(stage.paths.checkpoints)) == [3]


def test_steps_are_ordered_by_number(stage):
    for step in (10, 9, 100):
        publish(stage, step)
    assert list(durable.committed(stage.paths.checkpoints)) == [9, 10, 100]


def test_a_flipped_bit_is_named_with_both_hashes(stage):
    publish(stage, 3)
    (stage.paths.checkpoint(3) / "trainer" / "shard").write_bytes(b"statf")
    with pytest.raises(Damaged, match=r"trainer/shard is damaged: expected xxh3 \w+, found \w+"):
        durable.verify(stage.paths.checkpoint(3))


def test_a_truncated_file_is_not_committed(stage):
    publish(stage, 3)
    (stage.paths.checkpoint(3) / "trainer" / "shard").write_bytes(b"stat")
    assert durable.committed(stage.paths.checkpoints) == {}
    with pytest.raises(Damaged, match="has 4 bytes; its manifest says 5"):
        durable.verify(stage.paths.checkpoint(3))


def test_every_byte_of_a_manifest_counts(stage):
    publish(stage, 3)
    path = stage.paths.checkpoint(3) / durable.MANIFEST
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert durable.read_committed(stage.paths.checkpoint(3)) is None, position
    path.write_bytes(data)
    assert durable.read_committed(stage.paths.checkpoint(3)) is not None


def test_a_directory_under_another_step_is_damaged(stage):
    publish(stage, 3)
    os.rename(stage.paths.checkpoint(3), stage.paths.checkpoint(4))
    assert durable.committed(stage.paths.checkpoints) == {}


def test_the_same_content_again_is_a_no_op_and_other_content_is_refused(stage):
    publish(stage, 3)
    publish(stage, 3)
    with pytest.raises(RatchetError, match="never overwritten"):
        publish(stage, 3, b"other")
    assert (stage.paths.checkpoint(3) / "trainer" / "shard").read_bytes() == b"state"


def test_a_revoked_process_can_publish_delete_and_append_nothing(stage, paths):
    publish(stage, 3)
    staged = stage.begin("checkpoint_4")
    (staged / "shard").write_bytes(b"x")
    manifest = Manifest(kind="checkpoint", step=4, attempt=1, files=tuple(durable.seal(staged)))
    successor = Stage.open(paths, "002.launcher.0")
    successor.revoke()

    for attempt in (
        lambda: stage.commit(staged, paths.checkpoint(4), manifest),
        lambda: stage.begin("again"),
        lambda: stage.remove(paths.checkpoint(3)),
        lambda: stage.append(paths.root / "rows", b"row"),
        lambda: stage.replace(paths.root / "file", b"data"),
    ):
        with pytest.raises((Fenced, FileNotFoundError)):
            attempt()
    assert list(durable.committed(paths.checkpoints)) == [3]
    assert not (paths.root / "rows").exists()
    assert os.listdir(paths.staging) == ["002.launcher.0"]


def test_a_token_is_never_used_twice(stage, paths):
    with pytest.raises(FileExistsError):
        Stage.open(paths, stage.token)


def test_removal_leaves_no_half_of_a_directory_under_its_name(stage):
    publish(stage, 3)
    stage.remove(stage.paths.checkpoint(3))
    assert not stage.paths.checkpoint(3).exists()
    assert os.listdir(stage.directory) == [GATE]
    stage.remove(stage.paths.checkpoint(3))


def test_a_file_is_replaced_whole(stage):
    path = stage.paths.root / "run.toml"
    stage.replace(path, b"one")
    stage.replace(path, b"two")
    assert path.read_bytes() == b"two"


def test_a_library_that_makes_missing_directories_does_not_bring_a_revoked_workshop_back(paths, stage):
    rows, old = paths.metric("trainer"), Manifest(kind="checkpoint", step=4, attempt=1, files=())
    rows.parent.mkdir()
    publish(stage, 3)
    stage.create(rows, b"{}\n")
    directory = stage.begin("checkpoint_4")
    Stage.open(paths, "001.launcher.0").revoke()
    (directory / "trainer").mkdir(parents=True)
    (directory / "trainer" / "shard").write_bytes(b"late")
    attempts = {
        "commit": lambda: stage.commit(directory, paths.checkpoint(4), old),
        "begin": lambda: stage.begin("weights_4"),
        "replace": lambda: stage.replace(rows, b"late"),
        "create": lambda: stage.create(paths.metric("evals"), b"late"),
        "append": lambda: stage.append(rows, b"late"),
        "extend": lambda: stage.extend(rows, b"late"),
        "truncate": lambda: stage.truncate(rows, 0),
        "move": lambda: stage.move(paths.checkpoint(3), paths.checkpoint(5)),
        "remove": lambda: stage.remove(paths.checkpoint(3)),
        "open_for": lambda: stage.open_for("001.trainer.3"),
        "check": stage.check,
    }
    for name, late in attempts.items():
        with pytest.raises(Fenced, match=r"001.trainer.1 was replaced"):
            late()
        assert rows.read_bytes() == b"{}\n", name
        assert list(durable.committed(paths.checkpoints)) == [3], name
    assert not paths.metric("evals").exists()


@pytest.mark.parametrize("size", [0, 1, 3 << 20, (33 << 20) + 5])
def test_a_file_that_seals_itself_says_what_sealing_it_afterwards_would_say(tmp_path, size):
    with durable.SealedFile(tmp_path / "shard") as sealed, io.BufferedWriter(sealed, 1 << 16) as file:
        file.write(b"head")
        file.write(random.Random(size).randbytes(size))
        file.write(b"tail")
    assert [sealed.entry("shard")] == durable.seal(tmp_path)
    assert sealed.entry("shard").size == size + 8


def test_a_file_that_seals_itself_is_on_the_disk_when_it_is_closed(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (real(fd), synced.append(os.fstat(fd)))[0])
    with durable.SealedFile(tmp_path / "shard") as sealed:
        sealed.write(b"state")
        assert synced == []
    there = (tmp_path / "shard").stat()
    assert [(found.st_ino, found.st_size) for found in synced] == [(there.st_ino, 5)]


def test_the_disk_begins_before_a_large_file_ends(tmp_path, monkeypatch):
    handed, real = [], durable.start_writing
    monkeypatch.setattr(
        durable, "start_writing", lambda fd, *range: (real(fd, *range), handed.append(range))[0]
    )
    with durable.SealedFile(tmp_path / "shard") as sealed, io.BufferedWriter(sealed, 1 << 16) as file:
        file.write(bytes(40 << 20))
        assert handed == [(0, 16 << 20), (16 << 20, 16 << 20)]


def test_a_file_that_seals_itself_begins_empty_and_never_goes_back(tmp_path):
    with durable.SealedFile(tmp_path / "shard") as sealed, io.BufferedWriter(sealed, 1 << 16) as file:
        file.write(b"state")
        with pytest.raises(io.UnsupportedOperation):
            file.seek(0)
    with pytest.raises(FileExistsError):
        durable.SealedFile(tmp_path / "shard")


def test_a_failed_flush_is_an_error_of_the_closing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "the disk is gone")

    sealed = durable.SealedFile(tmp_path / "shard")
    sealed.write(b"state")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        sealed.close()
    assert sealed.closed


@pytest.mark.parametrize("size_bytes", [0, 5, (16 << 20) + 3])
def test_a_copy_is_whole_and_new(tmp_path, size_bytes):
    (tmp_path / "a").write_bytes(bytes(range(256)) * (size_bytes // 256) + b"x" * (size_bytes % 256))
    durable.copy_file(tmp_path / "a", tmp_path / "b")
    assert durable.hash_file(tmp_path / "b") == durable.hash_file(tmp_path / "a")
    assert (tmp_path / "b").stat().st_size == size_bytes
    with pytest.raises(FileExistsError):
        durable.copy_file(tmp_path / "a", tmp_path / "b")
