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
from ratchet.inputs import files
from ratchet.inputs.seen import Seen
from ratchet.inputs.tree import Inputs
from ratchet.launch.early import Begun
from ratchet.launch.join import join_orchestrator
from ratchet.launch.nodes import join_trainer
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
        check_sft(config, Seen(Inputs()))
        return submit("sft", config, config.slurm)
    return run("sft", config, ("trainer",), lambda seen: check_sft(config, seen), begun)


def check_sft(config: SFTConfig, seen: Seen) -> None:
    """Refuse input that no SFT run could use, and see what it is. Raises: Refusal"""
    from ratchet.chat import Chat
    from ratchet.models.limits import limits_of
    from ratchet.trainer.sft_data import check_data, data_inputs

    _check_model(config, seen)
    seen.add(data_inputs(config.data))
    chat = Chat.load(config.model.tokenizer or config.model.name)
    check_data(config.data, chat, config.seed, limits_of(config.model))


def _check_model(config: RunConfig, seen: Seen) -> None:
    """The bytes first: files that were changed may be none that can be read. Raises: Refusal"""
    from ratchet.models.check import check_files, check_model

    check_files(config.model)
    seen.add(files.of_program(samples=isinstance(config, RLConfig)) | files.of_model(config.model))
    check_model(config.model)
    if seen.needs_weights and files.has_weights(config.model):
        seen.add(files.weights_of(config.model))


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
        check_rl(config, Seen(Inputs()), is_alone=True)
        return submit("rl", config, config.slurm)
    roles = ("inference", "orchestrator", "trainer")
    return run("rl", config, roles, lambda seen: check_rl(config, seen), begun)


def check_rl(config: RLConfig, seen: Seen, *, is_alone: bool = False) -> None:
    """Refuse input that no RL run could use, and see what it is. A program that is alone sees no server.

    Raises: Refusal
    """
    from ratchet.inference.vllm import command
    from ratchet.models.check import check_served
    from ratchet.orchestrator.check import check, probe

    _check_model(config, seen)
    if config.inference is not None and config.inference.engine != "vllm":
        check_served(config.model)
    check(config, seen)
    if is_alone:
        return
    check_memory(config)
    if config.inference is None:
        probe(config)
        return
    address.listen(config.inference.host, 0).close()
    if config.inference.engine == "vllm":
        command.check(config)


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
    return run("rl", config, ("trainer",), lambda seen: check_trainer(config, seen), begun)


def check_trainer(config: RLConfig, seen: Seen) -> None:
    """Refuse what no trainer of an RL run could use, and see what it is. Raises: Refusal"""
    from ratchet.orchestrator.check import check_temperatures

    check_temperatures(config)
    check_memory(config)
    _check_model(config, seen)


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
    from ratchet.models.check import check_files, check_model, check_served

    is_vllm = config.inference is not None and config.inference.engine == "vllm"
    check_files(config.model)
    check_model(config.model, may_be_quantised=is_vllm)
    files.check_stated(config.model)
    if not is_vllm:
        check_served(config.model)
    from ratchet.inference.__main__ import serve
    from ratchet.inference.vllm import command

    if is_vllm:
        command.check(config)
    return serve(config)
