"""Runs of the toy, each a process of its own that may be killed, as long or as often as a test wants.

They are forked from one process, which has imported everything: the imports are three quarters of a short run.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

LIMIT_S = 60
PASSAGES = "passages.json"


class Ended(NamedTuple):
    """How one run ended, what it said, and, if asked for, how often it passed each durable point."""

    returncode: int
    stdout: str
    stderr: str
    passages: Counter


class Toys:
    """Verbs: run, close. A run stands in `root`; the command names it relative to the folder that holds it, so that
    a copy of a run is continued by the same command."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, root, *flags, steps, crash_at="", is_counted=False):
        request = {
            "folder": str(root.parent),
            "arguments": [root.name, str(steps), *flags],
            "crash_at": crash_at,
            "is_counted": is_counted,
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        said, complained = ((root.parent / name).read_text() for name in ("stdout", "stderr"))
        passages = json.loads((root.parent / PASSAGES).read_text()) if is_counted else {}
        return Ended(code, said, complained, Counter(passages))

    def close(self):
        self._server.communicate()


def serve():
    """One run for each line of the input, one exit code for each run."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become_a_run(**json.loads(line))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def become_a_run(folder, arguments, crash_at, is_counted):
    os.chdir(folder)
    for descriptor, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.alarm(LIMIT_S)
    sys.argv = ["toy", *arguments]
    durable._crash_at = crash_at
    process.run(counted(toy.main) if is_counted else toy.main)


def counted(main):
    """Leave the number of passages of each durable point in a file, at the end."""
    passages, real = Counter(), durable.crash_point

    def point(name):
        passages[name] += 1
        real(name)

    def run():
        code = main()
        Path(PASSAGES).write_text(json.dumps(passages))
        return code

    durable.crash_point = point
    return run


if __name__ == "__main__":
    import toy

    from ratchet import durable, process

    serve()
