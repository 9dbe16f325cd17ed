"""Train a run again from its batches, in a process with the thread counts of the run."""

import subprocess
import sys
from pathlib import Path

from ratchet import attempts
from ratchet.errors import Refusal
from ratchet.launch.supervisor import child_environment
from ratchet.paths import RunPaths


def replay(root: Path) -> int:
    """Raises: Refusal for a directory without a run."""
    record = attempts.newest(RunPaths(root))
    if record is None:
        raise Refusal(f"{root} is not a run directory: it has no attempts/.")
    threads = attempts.read_config(RunPaths(root), record).trainer.threads
    command = [sys.executable, "-m", "ratchet.trainer.replay", str(root)]
    return subprocess.run(command, env=child_environment(threads), check=False).returncode
