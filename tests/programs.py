"""Start the real commands in tests, watch their run directories, and end them by real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ratchet import digest, metrics
from ratchet.paths import RunPaths

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TINY_SFT = ("@", "examples/reverse_text/sft.toml", "--data.batch-size", "16", "--trainer.threads", "1")


def environment(**extra):
    return {**os.environ, "NO_COLOR": "1", **{k: str(v) for k, v in extra.items()}}


def start(command, *arguments, cwd=ROOT, **extra):
    """Start one of our commands, in the repository's root unless told otherwise; its output is piped."""
    return subprocess.Popen(
        [BIN / command, *map(str, arguments)],
        cwd=cwd,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(command, *arguments, code=0, **extra):
    """Run one of our commands to its end; returns what it said."""
    process = start(command, *arguments, **extra)
    output, _ = process.communicate()
    assert process.returncode == code, f"exit code {process.returncode}:\n{output}"
    return output


def rows(root, role="trainer"):
    """The exact part of a run's metric rows."""
    return [metrics.exact(row) for row in metrics.read(RunPaths(root).metric(role))]


def wait_until(claim, timeout_s=120.0, process=None):
    """Poll until a claim holds; the process, if given, must stay alive until then."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "the awaited event did not come"
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}:\n{process.stdout.read()}")
        time.sleep(0.01)


def last_step(root):
    found = metrics.read(RunPaths(root).metric("trainer"))
    return found[-1]["step"] if found else 0


def kill(process):
    """kill -9, as a machine does."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def processes_of(root, role=""):
    """The programs of a run: processes whose command line names its directory or one below, and their role."""
    found, own = [], (str(root).encode(), f"{root}/".encode())
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            is_own = any(word == own[0] or word.startswith(own[1]) for word in line)
            is_nursery = b"ratchet.nursery" in line  # it names what it imports
            if is_own and f"ratchet.{role}".encode() in (
                b"ratchet.nursery" if is_nursery else b" ".join(line)
            ):
                found.append(int(entry.name))
    return found


def outcome(root):
    """The outcome of the newest attempt, or None while it is open."""
    newest = max(RunPaths(root).attempts.iterdir())
    return json.loads((newest / "record.json").read_text())["outcome"]


def run_digest(root):
    return digest.run_digest(root)
