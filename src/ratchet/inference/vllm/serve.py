"""vLLM's API server as one of our programs, run by the interpreter of vLLM's own environment.

python -m ratchet.inference.vllm.serve FD WORKSHOP -- VLLM-ARGUMENTS

The socket was listening before this process began, and stays open in the launcher: a server that replaces this one
has the same port, and nobody else can have it.
"""

import asyncio
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ratchet import address, heartbeat, log, process
from ratchet.errors import EXIT_OK, RatchetError
from ratchet.log import LOGGER
from ratchet.paths import RunPaths
from ratchet.stage import Stage

# On a CPU: what vLLM's own defaults cost there, or break. The command line and the environment have the last word.
_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default claims nine tenths of the machine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS counts; pinned threads would meet the trainer's
    "TORCH_COMPILE_DISABLE": "1",  # compiling the rank of a logprob would hold up the first answer for 17 s
}
_CPU_ARGUMENTS = ("--enforce-eager", "--no-enable-chunked-prefill")
_CPU_MIN_BATCHED_TOKENS = 4096


def _tie_lives() -> None:
    """Die with the process above, and let those below die with this one."""
    process.die_with_parent()
    os.environ["RATCHET_PARENT"] = str(os.getpid())


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    _tie_lives()
    log.setup("inference")
    separator = sys.argv.index("--")
    fd, workshop = sys.argv[1:separator]
    if workshop:
        directory = Path(workshop)
        heartbeat.start(Stage(RunPaths(directory.parents[1]), directory.name))
    with socket.socket(fileno=int(fd)) as listener:
        _serve(listener, sys.argv[separator + 1 :])
    return EXIT_OK


def _serve(listener: socket.socket, given: Sequence[str]) -> None:
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker  # pyright: ignore

    from ratchet.inference.vllm.front import Front

    arguments = _parse(given)
    arguments.host, arguments.port = listener.getsockname()[:2]
    served_at = address.url(listener)

    was_asked = False

    def remember(*_: object) -> None:
        nonlocal was_asked
        was_asked = True

    watching = []

    def on_ready(front: Front) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, remember)  # beside vLLM's own, which its event loop calls all the same
        watching.append(asyncio.create_task(heartbeat.follow_answers(front.answers)))
        LOGGER.info("serving %s at %s", arguments.model, served_at)

    Front.on_ready = staticmethod(on_ready)  # pyright: ignore[reportAttributeAccessIssue]
    signal.signal(signal.SIGTERM, _interrupt)
    asyncio.run(run_server_worker(served_at, listener, arguments))
    if not was_asked:
        raise RatchetError("vLLM's engine died, and its API server ended with it: the lines above say why.")


def _parse(given: Sequence[str]) -> Namespace:
    from vllm.entrypoints.launchers.cli_args import (  # pyright: ignore
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.platforms import current_platform  # pyright: ignore
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # pyright: ignore

    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args(list(given))
    if current_platform.is_cpu():
        arguments = parser.parse_args([*_for_cpu(arguments), *given])
    validate_parsed_serve_args(arguments)
    return arguments


def _for_cpu(wanted: Namespace) -> list[str]:
    """What comes before the given arguments on a CPU.

    A seeded request whose prompt is prefilled in pieces ends the engine, so prompts are never cut.
    """
    for name, value in _CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    tokens = max(wanted.max_model_len or 0, _CPU_MIN_BATCHED_TOKENS)
    added = [*_CPU_ARGUMENTS, "--max-num-batched-tokens", str(tokens)]
    if wanted.tensor_parallel_size == wanted.pipeline_parallel_size == wanted.data_parallel_size == 1:
        # One worker needs no process of its own: a third less memory, and a start that is a third shorter.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        added += ["--distributed-executor-backend", "uni"]
    return added


def _interrupt(*_: object) -> None:
    """Until vLLM has its own handlers."""
    raise KeyboardInterrupt


if __name__ == "__mp_main__":
    # A process that vLLM spawned begins by importing this module; its plugins come many seconds of imports later.
    _tie_lives()
if __name__ == "__main__":
    process.run(main)
