"""The nursery that begins before its command is parsed: early enough, for nothing else, and never left behind."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from programs import TINY_SFT, processes_of, run, wait_until
from ratchet.cli import programs
from ratchet.config import RLConfig
from ratchet.config_io import load
from ratchet.launch import early
from ratchet.launch.run import _open_nursery

RL = ("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model")
SECOND_NODE = ("--trainer.nnodes", "2", "--trainer.node-rank", "1", "--trainer.rendezvous", "127.0.0.1:9")


@pytest.fixture
def begun():
    """A nursery that has hardly anything to import."""
    begun = early.begin(["json"], [])
    yield begun
    begun.close()


def is_alive(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_nothing_that_takes_time_is_imported_before_a_nursery_begins():
    code = (
        "import sys, ratchet.cli.entry\n"
        "ours = {name for name in sys.modules if name.startswith('ratchet')}\n"
        "assert ours == {'ratchet', 'ratchet.cli', 'ratchet.cli.entry', 'ratchet.launch', 'ratchet.launch.early'}\n"
        "assert not {'msgspec', 'pydantic', 'logging', 'asyncio', 'ctypes'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["@", "run.toml", "-h"], ["--replay", "run"]])
def test_a_command_that_asks_for_no_run_begins_no_nursery(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft", *arguments])
    monkeypatch.setattr(early, "begin", lambda *_: pytest.fail("none is needed"))
    assert early.begin_for(["trainer"]) is None


def test_a_command_begins_one_with_what_its_roles_import_and_its_own_words(monkeypatch):
    asked = []
    monkeypatch.setattr(sys, "argv", ["rl", "@", "run.toml"])
    monkeypatch.setattr(early, "begin", lambda *arguments: asked.append(arguments))
    early.begin_for(["trainer", "inference"])
    assert asked == [(["ratchet.trainer.loop", "ratchet.inference.serving"], ["@", "run.toml"])]


@pytest.mark.parametrize(
    ("command", "arguments", "code"),
    [
        ("sft", [*TINY_SFT, "--max-stepz", "3"], 2),
        ("rl", [*RL, "--max-steps", "-1"], 2),
        ("trainer", [*RL, "--max-steps", "-1"], 2),
        ("sft", [*TINY_SFT, "--model.name", "there/is/none"], 2),
    ],
)
def test_a_refusal_leaves_no_nursery_behind(command, arguments, code, tmp_path):
    run(command, *arguments, "--output-dir", tmp_path / "run", code=code)
    assert not processes_of(tmp_path / "run")


@pytest.mark.parametrize("delay_s", [0, 0.02, 0.1, 0.5])
def test_a_nursery_dies_with_its_launcher_however_young_it_is(delay_s, tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)")
    code = f"""
import os, signal, sys, time
from ratchet.launch import early
print(early.begin(["slow"], []).process.pid, flush=True)
time.sleep({delay_s})
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    pid = int(killed.stdout)
    wait_until(lambda: not is_alive(pid), timeout_s=20)


def test_a_run_takes_the_nursery_that_had_begun(begun):
    config = load(RLConfig, [*RL])
    with contextlib.ExitStack() as held:
        nursery = _open_nursery(config, ("inference", "orchestrator", "trainer"), held, begun)
        assert nursery is not None
        assert nursery._process is begun.process
        assert nursery.roles == {"trainer", "inference"}
        assert is_alive(begun.process.pid)
    assert not is_alive(begun.process.pid)


def test_servers_of_vllm_are_not_for_it(begun):
    config = load(RLConfig, [*RL, "--inference.engine", "vllm"])
    with contextlib.ExitStack() as held:
        nursery = _open_nursery(config, ("inference", "orchestrator", "trainer"), held, begun)
        assert nursery is not None
        assert nursery.roles == {"trainer"}


def test_it_is_ended_where_this_process_cannot_adopt_what_is_forked(begun, monkeypatch):
    def refuse(*_):
        raise OSError("no prctl here")

    monkeypatch.setattr("ratchet.launch.run.Nursery", refuse)
    with contextlib.ExitStack() as held:
        assert _open_nursery(load(RLConfig, [*RL]), ("trainer",), held, begun) is None
    assert not is_alive(begun.process.pid)


@pytest.mark.parametrize(
    ("main", "arguments", "other"),
    [
        (programs._sft, [*TINY_SFT, *SECOND_NODE], "join_trainer"),
        (programs._rl, [*RL, *SECOND_NODE], "join_trainer"),
        (programs._trainer, [*RL, *SECOND_NODE], "join_trainer"),
        (programs._sft, [*TINY_SFT, "--slurm.executor", "local"], "submit"),
        (programs._rl, [*RL, "--slurm.executor", "local"], "submit"),
    ],
)
def test_where_other_processes_do_the_work_it_is_ended_first(main, arguments, other, begun, monkeypatch):
    def work(*_):
        assert not is_alive(begun.process.pid)
        return 7

    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    monkeypatch.setattr(programs, other, work)
    for name in ("check_sft", "check_rl"):
        monkeypatch.setattr(programs, name, lambda *_, **__: {})
    assert main(begun) == 7
