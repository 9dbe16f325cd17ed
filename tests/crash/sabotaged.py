"""The toy run with one protection switched off: `python sabotaged.py ARM RUN_DIR MAX_STEPS [flags]`.

TOY_STOP_AT=<point>:<n> suspends the process at a durable point, as a machine that hangs does.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import msgspec
import toy

from ratchet import attempts, batchlog, checkpoint, durable, journal, process
from ratchet.stage import Stage


def manifest_before_data():
    """The name and the manifest are there first, the data comes after."""

    def commit(stage, directory, target, manifest):
        manifest = msgspec.structs.replace(manifest, files=tuple(sorted(manifest.files)))
        manifest = msgspec.structs.replace(manifest, hash=durable._manifest_hash(manifest))
        if target.exists():
            return manifest
        target.mkdir()
        (target / durable.MANIFEST).write_bytes(durable.encode_manifest(manifest))
        durable.crash_point(f"{manifest.kind}.after_rename")
        shutil.copytree(directory, target, dirs_exist_ok=True)
        return manifest

    Stage.commit = commit


def no_hash():
    """Sizes are compared, contents are not."""

    def verify(directory):
        manifest = durable.read_manifest(directory)
        durable.check_sizes(directory, manifest)
        return manifest

    durable.verify = verify


def delete_in_place():
    """A directory is emptied under its published name."""

    def remove(stage, path):
        for file in sorted((p for p in path.rglob("*") if p.is_file()), reverse=True):
            file.unlink()
            durable.crash_point("remove.after_rename")
        shutil.rmtree(path, ignore_errors=True)

    Stage.remove = remove


def cursor_ahead():
    """A checkpoint takes the orchestrator's newest state, not the one that belongs to its step."""

    def copy(stage, directory, step):
        newest = max(durable.steps(stage.paths.batches))
        target = directory / checkpoint.STATE
        target.parent.mkdir()
        target.write_bytes(batchlog.read_state(stage.paths.batch(newest)))
        return durable.seal(directory, [checkpoint.STATE])

    checkpoint.copy_orchestrator_state = copy


def no_lock():
    """Another host's launcher: the advisory lock does not hold it back. The fence alone must."""
    attempts.Lock.acquire = lambda lock: None


def no_fence():
    """Neither lock nor fence."""
    no_lock()
    Stage.revoke = lambda self, prefix="": None


def journal_not_asked():
    """Finished rollouts are kept, and generated again all the same."""
    journal.Journal.find = lambda own, rollout: None


def nothing():
    """Every protection on: what the arms are compared with."""


def stop_at(wanted):
    real, seen = durable.crash_point, {}

    def point(name):
        seen[name] = seen.get(name, 0) + 1
        if wanted == f"{name}:{seen[name]}":
            os.kill(os.getpid(), signal.SIGSTOP)
        real(name)

    durable.crash_point = point


if __name__ == "__main__":
    arm = sys.argv.pop(1)
    globals()[arm]()
    if "TOY_STOP_AT" in os.environ:
        stop_at(os.environ["TOY_STOP_AT"])
    process.run(toy.main)
