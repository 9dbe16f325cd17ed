"""The commands `sft`, `rl`, `trainer`, `orchestrator`, `inference`: parse, check, run, exit code.

Heavy imports wait until a command needs them: a refusal is said in well under a second.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from ratchet import address, log, process
from ratchet.config import RLConfig, RunConfig, ServerConfig, SFTConfig
from ratchet.config_io import load
from ratchet.errors import Refusal
from ratchet.launch.early import Begun
from ratchet.launch.join import join_orchestrator
from ratchet.launch.nodes import join_trainer
from ratchet.launch.opening import Fingerprints
from ratchet.launch.preflight import check_memory
from ratchet.launch.replay import replay
from ratchet.launch.run import run
from ratchet.launch.slurm import submit

C = TypeVar("C", bound=RunConfig)


def _parse(cls: type[C], role: str) -> C:
    log.setup(role)
    config = load(cls, sys.argv[1:])
    log.setup(role, config.log.level)
    return config


def _run(main: Callable[[Begun | None], int], begun: Begun | None) -> NoReturn:
    """Run a command to its exit code; however it ends, the nursery that had begun for it does not outlive it."""

    def whole() -> int:
        try:
            return main(begun)
        finally:
            _end(begun)

    process.run(whole)


def _end(begun: Begun | None) -> None:
    """Where no program of ours is started by this process, a nursery is of no use."""
    if begun is not None:
        begun.close()


def sft(begun: Begun | None = None) -> NoReturn:
    """Supervised fine-tuning."""
    _run(_sft, begun)


def _sft(begun: Begun | None) -> int:
    config = _parse(SFTConfig, "sft")
    if config.trainer.node_rank > 0:
        _end(begun)
        return join_trainer(config, config.trainer)
    if config.slurm is not None:
        _end(begun)
        check_sft(config)
        return submit("sft", config, config.slurm)
    return run("sft", config, ("trainer",), lambda: check_sft(config), begun)


def check_sft(config: SFTConfig) -> Fingerprints:
    """Refuse input that no SFT run could use; returns what it is. Raises: Refusal"""
    from ratchet.chat import Chat
    from ratchet.models.check import check_model
    from ratchet.trainer.sft_data import check_data

    model = check_model(config.model)
    data = check_data(config.data, Chat.load(config.model.tokenizer or config.model.name))
    return {"model": model, "data": data}


def rl(begun: Begun | None = None) -> NoReturn:
    """Asynchronous RL: the trainer, the orchestrator and, given an [inference] section, inference."""
    _run(_rl, begun)


def _rl(begun: Begun | None) -> int:
    config = _parse(RLConfig, "rl")
    if config.trainer.node_rank > 0:
        _end(begun)
        return join_trainer(config, config.trainer)
    if config.slurm is not None:
        _end(begun)
        check_rl(config, is_alone=True)
        return submit("rl", config, config.slurm)
    roles = ("inference", "orchestrator", "trainer")
    return run("rl", config, roles, lambda: check_rl(config), begun)


def check_rl(config: RLConfig, *, is_alone: bool = False) -> Fingerprints:
    """Refuse input that no RL run could use; returns what it is. A program that is alone sees no server.

    Raises: Refusal
    """
    from ratchet.inference.vllm import command
    from ratchet.models.check import check_model
    from ratchet.orchestrator.check import check, probe

    found = {"model": check_model(config.model), **check(config)}
    if is_alone:
        return found
    check_memory(config)
    if config.inference is None:
        probe(config)
        return found
    address.listen(config.inference.host, 0).close()
    if config.inference.engine == "vllm":
        command.check(config)
    return found


def trainer(begun: Begun | None = None) -> NoReturn:
    """The trainer of an RL run alone: it opens the attempt, other machines join it.

    `trainer --replay RUN` trains a finished or stopped run again from its batches, and compares.
    """
    _run(_replay if sys.argv[1:2] == ["--replay"] else _trainer, begun)


def _replay(begun: Begun | None) -> int:
    _end(begun)
    log.setup("trainer")
    if len(sys.argv) != 3:
        raise Refusal("Usage: trainer --replay RUN, with the directory of a run.")
    return replay(Path(sys.argv[2]))


def _trainer(begun: Begun | None) -> int:
    config = _parse(RLConfig, "trainer").model_copy(update={"slurm": None})
    if config.trainer.node_rank > 0:
        _end(begun)
        return join_trainer(config, config.trainer)
    return run("rl", config, ("trainer",), lambda: check_trainer(config), begun)


def check_trainer(config: RLConfig) -> Fingerprints:
    """Refuse what no trainer of an RL run could use; returns what it is. Raises: Refusal"""
    from ratchet.models.check import check_model
    from ratchet.orchestrator.check import check_temperatures

    check_temperatures(config)
    check_memory(config)
    return {"model": check_model(config.model)}


def orchestrator() -> NoReturn:
    """The orchestrator of an RL run alone: it joins the attempt that a trainer opened."""
    process.run(_orchestrator)


def _orchestrator() -> int:
    config = _parse(RLConfig, "orchestrator")
    return join_orchestrator(config)


def inference() -> NoReturn:
    """A standing inference server."""
    process.run(_inference)


def _inference() -> int:
    config = _parse(ServerConfig, "inference")
    from ratchet.models.check import check_model

    is_vllm = config.inference is not None and config.inference.engine == "vllm"
    check_model(config.model, may_be_quantised=is_vllm)
    from ratchet.inference.__main__ import serve
    from ratchet.inference.vllm import command

    if is_vllm:
        command.check(config)
    return serve(config)
