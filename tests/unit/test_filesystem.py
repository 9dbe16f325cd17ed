"""The preflight of a shared directory: silent where all is well, one sentence with its remedy for each failure."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from ratchet import durable
from ratchet.errors import Refusal
from ratchet.launch import filesystem


def refuse(*arguments, **more):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def test_a_local_disk_passes_and_nothing_is_left_there(tmp_path):
    assert filesystem.check(tmp_path / "new") == []
    assert list((tmp_path / "new").iterdir()) == []


def overwrite(source, target):
    """A rename that replaces whatever stands there, as object stores under a mount do."""
    if Path(target).is_dir():
        for child in Path(target).iterdir():
            child.unlink()
    real_rename(source, target)


real_rename = os.rename


@pytest.mark.parametrize(
    ("owner", "name", "stand_in", "says"),
    [
        (os, "rename", refuse, "A rename in .* fails .*use a POSIX file system"),
        (os, "rename", overwrite, "A rename in .* replaces a directory that is not empty: use a POSIX"),
        (durable, "fsync_path", refuse, "fsync in .* fails .*use another file system"),
        (fcntl, "flock", refuse, "A lock in .* cannot be taken .*without `nolock`"),
        (fcntl, "flock", lambda *a: None, "A lock in .* does not keep another process out"),
        (
            filesystem,
            "appears",
            lambda *a: False,
            "not seen by another within 0.5 s: lower the attribute cache",
        ),
    ],
    ids=[
        "no rename",
        "rename over a full directory",
        "no fsync",
        "no lock",
        "a lock of no effect",
        "not visible",
    ],
)
def test_each_failure_is_one_sentence(tmp_path, monkeypatch, owner, name, stand_in, says):
    monkeypatch.setattr(owner, name, stand_in)
    with pytest.raises(Refusal, match=says):
        raise Refusal(*filesystem.check(tmp_path, visible_s=0.5))
    assert list(tmp_path.iterdir()) == []


def test_a_full_or_read_only_disk_is_said(tmp_path):
    (said,) = filesystem.check(tmp_path, needed_bytes=1 << 60)
    assert "1,152,921,504.6 GB are needed: make room" in said
    (tmp_path / "file").touch()
    (said,) = filesystem.check(tmp_path / "file")
    assert "cannot be written" in said
    with pytest.raises(Refusal):
        filesystem.require(tmp_path / "file")
