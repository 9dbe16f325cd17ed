"""`python -m ratchet.orchestrator RUN ATTEMPT INCARNATION --base-url URL ...`: one program of an open attempt."""

import argparse
import asyncio
from pathlib import Path

from ratchet import attempts, heartbeat, log, process
from ratchet.config import RLConfig
from ratchet.errors import EXIT_OK


def main() -> int:
    process.die_with_parent()
    log.setup("orchestrator")
    parser = argparse.ArgumentParser(prog="ratchet.orchestrator")
    parser.add_argument("run", type=Path)
    parser.add_argument("attempt", type=int)
    parser.add_argument("incarnation", type=int)
    parser.add_argument("--base-url", required=True, nargs="+")
    parser.add_argument("--own-server", action="store_true", help="the launcher started and watches them")
    arguments = parser.parse_args()
    run = attempts.join(arguments.run, arguments.attempt, "orchestrator", arguments.incarnation)
    config: RLConfig = run.config
    log.setup("orchestrator", config.log.level)
    with process.imports():
        from ratchet.orchestrator.start import orchestrate

    heartbeat.start(run.stage)
    asyncio.run(orchestrate(run, arguments.base_url, is_own_server=arguments.own_server))
    return EXIT_OK


if __name__ == "__main__":
    process.run(main)
