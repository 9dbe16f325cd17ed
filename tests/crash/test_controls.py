"""A campaign that cannot fail proves nothing: each protection is switched off, and the checks must notice.

Every arm runs twice, with the protection and without it, through the same accident.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ratchet import audit, digest, durable
from ratchet.paths import RunPaths

SABOTAGED = Path(__file__).with_name("sabotaged.py")
FLAGS = ("--ckpt.interval", "2", "--ckpt.keep-last", "3")


def start(arm, root, *flags, **env):
    command = [sys.executable, str(SABOTAGED), arm, str(root), "7", *FLAGS, *flags]
    return subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(arm, root, *flags, **env):
    process = start(arm, root, *flags, **env)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    root = tmp_path_factory.mktemp("controls") / "run"
    assert run("nothing", root)[0] == 0
    return digest.run_digest(root)


def torn(root):
    """Published names whose content is not whole: there are none at any instant."""
    paths = RunPaths(root)
    return [
        f"{kind.name}/step_{step} is torn"
        for kind in (paths.checkpoints, paths.batches, paths.weights)
        for step in durable.steps(kind)
        if durable.read_committed(kind / f"step_{step}") is None
    ]


def problems(root, reference, code, said):
    """What the checks of a campaign find in a run that has ended."""
    found = [] if code == 0 else [f"exit code {code}: {said}"]
    if digest.run_digest(root) != reference:
        found.append("the digest differs")
    found += [str(finding) for finding in audit.audit(RunPaths(root)).findings]
    lines = root.with_name(f"{root.name}.generated").read_text().split()
    found += [f"draw {draw} was generated {n} times" for draw, n in Counter(lines).items() if n > 1]
    return found


def accident_manifest(arm, root, reference):
    run(arm, root, RATCHET_CRASH_AT="checkpoint.after_rename:2")
    return torn(root) + problems(root, reference, *run(arm, root))


def accident_deletion(arm, root, reference):
    run(arm, root, RATCHET_CRASH_AT="remove.after_rename:1")
    return torn(root) + problems(root, reference, *run(arm, root))


def accident_flip(arm, root, reference):
    """A bit flips in the checkpoint that is resumed from: either it is named, or the result is right."""
    run(arm, root, RATCHET_CRASH_AT="checkpoint.committed:2")
    shard = RunPaths(root).checkpoint(4) / "trainer" / "state"
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    code, said = run(arm, root)
    return [] if code == 2 and "state is damaged" in said else problems(root, reference, code, said)


def accident_rollback(arm, root, reference):
    """Back to a checkpoint whose batches before it are pruned: its own copy of the state is used."""
    run(arm, root)
    code, said = run(arm, root, "--ckpt.resume-step", "4")
    assert "Rolling back" in said
    return [p for p in problems(root, reference, code, said) if "was generated" not in p]


def accident_kill(arm, root, reference):
    run(arm, root, RATCHET_CRASH_AT="batch.before_rename:3")
    return problems(root, reference, *run(arm, root))


def accident_zombie(arm, root, reference):
    """A process hangs, another host takes its run over and ends it, the first one wakes up."""
    zombie = start(arm, root, TOY_STOP_AT="batch.before_rename:3")
    wait_until_stopped(zombie.pid)
    code, said = run(arm, root)
    zombie.send_signal(signal.SIGCONT)
    zombie.communicate(timeout=60)
    return [p for p in problems(root, reference, code, said) if "was generated" not in p]


def wait_until_stopped(pid):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to its stop")


ARMS = {
    "manifest_before_data": (accident_manifest, "nothing"),
    "delete_in_place": (accident_deletion, "nothing"),
    "no_hash": (accident_flip, "nothing"),
    "cursor_ahead": (accident_rollback, "nothing"),
    "journal_not_asked": (accident_kill, "nothing"),
    "no_fence": (accident_zombie, "no_lock"),
}


@pytest.mark.parametrize("arm", ARMS)
def test_with_its_protection_the_accident_leaves_no_trace(tmp_path, reference, arm):
    accident, protected = ARMS[arm]
    assert accident(protected, tmp_path / "run", reference) == []


@pytest.mark.parametrize("arm", ARMS)
def test_without_its_protection_the_accident_is_caught(tmp_path, reference, arm):
    accident, _ = ARMS[arm]
    assert accident(arm, tmp_path / "run", reference) != []
