"""The nursery's process, started as a command's first act: what it imports takes longer than all else before a step.

So this file, and what it imports, is the least that a process can be started with. What the nursery is for, and
whether it is needed at all, is known later; `births.Nursery` then gives it its orders, or it is ended.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence

MODULES = {"trainer": "ratchet.trainer.loop", "inference": "ratchet.inference.serving"}
"""What a program of each role imports, of those that need torch."""
MEMORY = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={2**25}:glibc.malloc.trim_threshold={2**40}"
"""glibc keeps what a step frees, in large pages, for the next one, which needs as much again; from 32 MiB on a
tensor still goes back (a higher bound is refused by versions before 2.35, the rest not). Without it a step of small
tensors gives most of its memory back and faults it in anew."""
_ROOM = 1024
"""Bytes for the command lines of what is forked, besides the path of the interpreter."""


class Begun:
    """The process of a nursery, and the link to it. It dies with this process."""

    def __init__(self, process: "subprocess.Popen[bytes]", link: socket.socket) -> None:
        self.process = process
        self.link = link

    def close(self) -> None:
        """End it; again, nothing."""
        self.process.kill()
        self.process.wait()
        self.link.close()


def begin(modules: Iterable[str], words: Sequence[str]) -> Begun:
    """Start a nursery that imports these modules; the words are for those who look at its command line.

    Raises: OSError
    """
    link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        fd = str(theirs.fileno())
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "ratchet.nursery", fd, ",".join(modules), *words, "-" * _ROOM],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child_environment(threads=1, keeps_memory=True),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError:
            link.close()
            raise
    return Begun(process, link)


def begin_for(roles: Iterable[str]) -> Begun | None:
    """For this process's command, as far as it can be told before it is parsed; None where it may ask for no run."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help", "--replay"} & {*arguments}:
        return None
    try:
        return begin([MODULES[role] for role in roles], arguments)
    except OSError:
        return None


def child_environment(threads: int, *, keeps_memory: bool = False) -> dict[str, str]:
    """Fixed thread counts, one order of sets, who the parent is (see `process.die_with_parent`), and that freed memory
    is kept, unless the user says how it is allocated."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    fixed = {name: str(threads) for name in names} | {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
    }
    own = {"RATCHET_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    kept = {"GLIBC_TUNABLES": MEMORY} if keeps_memory else {}
    return {**kept, **os.environ, **fixed, **own}
