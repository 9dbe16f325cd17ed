"""`python -m ratchet.cli.job KIND NAME`: one program of a cluster run; its resolved configuration is the input."""

import sys

from ratchet import config_io, log, process
from ratchet.attempts import KINDS
from ratchet.cli.programs import check_rl, check_sft
from ratchet.config import RLConfig, SFTConfig, SlurmConfig
from ratchet.inputs.seen import Seen
from ratchet.launch import cluster
from ratchet.launch.nodes import join_trainer
from ratchet.launch.preflight import check_memory
from ratchet.launch.run import run


def main() -> int:
    """Run the program to its exit code."""
    process.die_with_parent()
    kind, name = sys.argv[1:3]
    log.setup(name)
    text = sys.stdin.buffer.read()
    config = config_io.parse_toml(KINDS[kind], text, "the job's configuration")
    log.setup(name, config.log.level)
    settings = config.slurm or SlurmConfig()
    config = config.model_copy(update={"slurm": None})
    assert isinstance(config, SFTConfig | RLConfig)
    if name == "trainer" and config.trainer.node_rank > 0:
        return join_trainer(config, config.trainer)
    if isinstance(config, SFTConfig):
        return run("sft", config, ("trainer",), lambda seen: check_sft(config, seen))
    if name == "orchestrator":
        return cluster.orchestrate(config, settings.wait_s)
    if name != "trainer":
        host = "127.0.0.1" if settings.executor == "local" else settings.host
        return cluster.serve(config, name, settings.wait_s, host)

    def check(seen: Seen) -> None:
        check_rl(config, seen, is_alone=True)
        check_memory(config)

    return run("rl", config, ("trainer",), check)


if __name__ == "__main__":
    process.run(main)
