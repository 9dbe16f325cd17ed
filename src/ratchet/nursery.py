"""Programs forked from one process that has imported what they need: `python -m ratchet.nursery FD MODULES ...`.

    launcher ── what to become ──► nursery ── fork, fork ──► program, a child of the launcher
    launcher ◄──── process id ───┘                             │
    launcher ──── leave to begin ──────────────────────────────┘

A program of which the launcher does not hear, because the nursery is killed at that moment, gets no leave and ends.
The process between the two forks ends at once, which makes the launcher, a "subreaper", the parent: it waits for the
program, the program dies with it, and how the nursery fares is of no concern to either. The nursery has one thread,
uses no GPU and does nothing but import, so what is forked from it is as good as a fresh interpreter. Should an import
have looked for a GPU all the same, the program becomes a fresh interpreter: no fork of that process can use one.
"""

import ctypes
import importlib
import os
import runpy
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ratchet import process
from ratchet.errors import EXIT_CRASH, EXIT_STOPPED

MOST_BYTES = 1 << 20
MOST_FDS = 8


class Order(msgspec.Struct, frozen=True):
    """One program: `python -m <module> <arguments>`, in an environment, with its output appended to a log."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    log: str
    fds: list[int]
    """The numbers under which it finds the file descriptors that come along; the last that comes is its leave."""


def main() -> None:
    """Import, then answer each order with the id of a process, until the launcher is gone."""
    # transformers asks whether there is a GPU where flash-attn is installed: let torch ask the driver's library.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with process.imports():
        for name in sys.argv[2].split(","):
            importlib.import_module(name)
    if threading.active_count() > 1:
        os._exit(EXIT_CRASH)  # the locks of another thread would stay locked in what is forked
    link = socket.socket(fileno=int(sys.argv[1]))
    while True:
        data, fds, _, _ = socket.recv_fds(link, MOST_BYTES, MOST_FDS)
        if not data:
            return
        born = _fork()
        if born == 0:
            link.close()
            *given, gate = fds
            if not os.read(gate, 1):
                os._exit(EXIT_STOPPED)
            os.close(gate)
            _become(msgspec.json.decode(data, type=Order), given)
            return
        for fd in fds:
            os.close(fd)
        link.send(str(born).encode())


def _fork() -> int:
    """Fork a child of the launcher's. Returns its process id, and 0 in itself."""
    reading, writing = os.pipe()
    middle = os.fork()
    if middle == 0:
        own = os.getpid()
        born = os.fork()
        if born:
            os.write(writing, str(born).encode())
            os._exit(0)
        os.close(reading)
        os.close(writing)
        while os.getppid() == own:
            time.sleep(0.001)
        return 0
    os.close(writing)
    born = int(os.read(reading, 32))
    os.close(reading)
    os.waitpid(middle, 0)
    return born


def _become(order: Order, fds: Sequence[int]) -> None:
    """Be what a new interpreter with this command line would be."""
    os.setsid()
    for fd, number in zip(fds, order.fds, strict=True):
        os.dup2(fd, number)
        if fd != number:
            os.close(fd)
    output = os.open(order.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.clear()
    os.environ.update(order.environment)
    command = [sys.executable, "-m", order.module, *order.arguments]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, command)
    sys.argv[1:] = order.arguments
    _show(command)
    runpy.run_module(order.module, run_name="__main__", alter_sys=True)


def _show(command: Sequence[str]) -> None:
    """Let `ps` show this command line, as far as there is room, in place of the nursery's."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"".join(word.encode() + b"\0" for word in command)[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    process.die_with_parent()
    main()
