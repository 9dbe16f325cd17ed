"""The inference program: a standing server, or the server of one run.

python -m ratchet.inference RUN ATTEMPT INCARNATION --fd N [--name NAME]
"""

import argparse
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from ratchet import address, attempts, heartbeat, log, process
from ratchet.attempts import Assignment
from ratchet.config import RLConfig
from ratchet.errors import EXIT_OK
from ratchet.inference.vllm.command import become
from ratchet.inputs import files
from ratchet.inputs.seen import Guard


def main() -> int:
    """Serve an attempt on the listening socket that the launcher passed on."""
    process.die_with_parent()
    parser = argparse.ArgumentParser(prog="ratchet.inference")
    parser.add_argument("run", type=Path)
    parser.add_argument("attempt", type=int)
    parser.add_argument("incarnation", type=int)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--name", default="inference", help="which of several servers of the run it is")
    arguments = parser.parse_args()
    log.setup("inference")
    assignment = attempts.join(arguments.run, arguments.attempt, arguments.name, arguments.incarnation)
    log.setup("inference", assignment.config.log.level)
    with socket.socket(fileno=arguments.fd) as listener:
        return _serve(
            assignment.config, listener, lambda line: log.LOGGER.info("%s", line), assignment, arguments.name
        )


def serve(config: RLConfig) -> int:
    """A standing server on the configured host and port, until SIGTERM or SIGINT. Raises: Refusal."""
    assert config.inference is not None
    with address.listen(config.inference.host, config.inference.port) as listener:
        return _serve(config, listener, lambda line: sys.stderr.write(f"{line}\n"))


def _serve(
    config: RLConfig,
    listener: socket.socket,
    say: Callable[[str], object],
    assignment: Assignment | None = None,
    name: str = "",
) -> int:
    assert config.inference is not None
    wanted = config.inference.device
    if assignment is not None:
        Guard(assignment, name).add(files.of_program(samples=True) | files.of_model(config.model))
    if config.inference.engine == "vllm":
        become(config, listener.fileno(), assignment.stage.directory if assignment is not None else None)
    # Read by cuBLAS when it starts, so before torch is imported.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with process.imports():
        from ratchet.inference.serving import serve_on
        from ratchet.models import device

    if assignment is None:
        chosen = device.choose(wanted)
        say(f"computing on {device.describe(chosen)}")
    else:
        heartbeat.start(assignment.stage)
        chosen = device.choose_for(assignment, name, wanted)
        device.note(assignment, name, chosen)
    serve_on(config, listener, say, chosen)
    return EXIT_OK


if __name__ == "__main__":
    process.run(main)
