"""`python -m ratchet.report.tracker RUN ATTEMPT`: follow the rows of an open attempt until told to end.

SIGTERM is the launcher's word that all rows are written: the last ones are copied, then it ends.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from ratchet import attempts, log, process
from ratchet.errors import EXIT_OK
from ratchet.report.tracker.follow import follow, open_sinks

_asked: list[int] = []


def _on_signal(number: int, frame: FrameType | None) -> None:
    _asked.append(number)


def main() -> int:
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # whatever it does can wait for training
    root, attempt = sys.argv[1:3]
    run = attempts.join(Path(root), int(attempt), "tracker", 1)
    log.setup("tracker", run.config.log.level)
    follow(run.stage, open_sinks(run), lambda: bool(_asked))
    return EXIT_OK


if __name__ == "__main__":
    process.die_with_parent()
    process.run(main)
