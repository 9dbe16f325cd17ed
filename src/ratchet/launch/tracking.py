"""The tracker of an attempt: a process that copies metric rows, which no other program waits for.

It is not one of the run's programs: if it fails, that is said once and the run goes on. At the end it has GRACE_S to
copy the last rows; what it could not send stays in the run directory, and the next attempt goes on from there.
"""

import subprocess
import sys
from typing import IO

from ratchet import attempts
from ratchet.launch.early import child_environment
from ratchet.launch.opening import Attempt

GRACE_S = 5.0


class Tracking:
    """Verbs: start, finish."""

    def __init__(self, opened: Attempt) -> None:
        self._opened = opened
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Nothing where no tracker is configured."""
        config, record = self._opened.config.tracker, self._opened.record
        if not config.tensorboard and config.wandb is None:
            return
        self._opened.stage.open_for(attempts.token(record.attempt, "tracker", 1))
        root = self._opened.paths.root
        command = [sys.executable, "-m", "ratchet.report.tracker", str(root), str(record.attempt)]
        with self._log() as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(threads=1),
                start_new_session=True,
            )

    def _log(self) -> IO[bytes]:
        return (self._opened.paths.attempt(self._opened.record.attempt) / "tracker.log").open("ab")

    def finish(self) -> str | None:
        """Let it copy the last rows, but not for long; returns what the user should know."""
        process = self._process
        if process is None:
            return None
        process.terminate()
        try:
            code = process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"The tracker needed more than {GRACE_S:g} s for its last rows and was ended."
        if code:
            log = self._opened.paths.attempt(self._opened.record.attempt) / "tracker.log"
            return f"The tracker ended with exit code {code}; curves may lack rows. Its log: {log}"
        return None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
