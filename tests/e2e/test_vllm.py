"""RL on a real vLLM: the server dies and freezes, everything dies, and a server that the user runs.

uv run pytest tests/e2e/test_vllm.py -n 0 --vllm-python PYTHON
"""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from programs import (
    ROOT,
    environment,
    kill,
    last_step,
    processes_of,
    rows,
    run,
    start,
    wait_until,
)
from ratchet import attempts
from ratchet.paths import RunPaths

pytestmark = pytest.mark.timeout(3600)

MODEL = "examples/reverse_text/model"
SMALL = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", MODEL, "--model.random-init"),
    *("--ckpt.interval", "2", "--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--launch.frozen-s", "20"),
    *("--orchestrator.eval.tasks", "8", "--orchestrator.eval.interval", "10"),
)
START_S = 900.0
"""A server's start on two busy cores; on two idle ones it is half a minute."""


@pytest.fixture(scope="module")
def python(request):
    return request.config.getoption("vllm_python")


@pytest.fixture
def vllm(python):
    return ("--inference.engine", "vllm", "--inference.vllm.python", python, "--inference.slots", "16")


def descendants(pid):
    """The processes that a process started, and those that they did."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def is_alive(pid):
    try:
        return not re.search(r"^State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return False


def server_of(root):
    """The API server of a run and the processes under it, among them the engine."""
    (server,) = processes_of(root, "inference")
    return server, descendants(server)


def restarts(root):
    record = attempts.newest(RunPaths(root))
    return [(restart.role, restart.reason) for restart in record.restarts]


def test_a_server_that_dies_or_freezes_is_replaced_alone_and_a_dead_run_continues(vllm, tmp_path):
    root = tmp_path / "run"
    command = (*SMALL, *vllm, "--max-steps", "20", "--output-dir", root)
    process = start("rl", *command)
    wait_until(lambda: last_step(root) >= 2, START_S, process)
    server, under = server_of(root)
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, under)), 20)
    wait_until(lambda: last_step(root) >= 4, START_S, process)
    assert restarts(root) == [("inference", "was killed by signal 9")]

    # Everything, after a step: nothing of it stays alive, and the same command goes on.
    _, under = server_of(root)
    kill(process)
    wait_until(lambda: not any(map(is_alive, under)) and not processes_of(root), 20)
    process = start("rl", *command)
    wait_until(lambda: last_step(root) >= 6, START_S, process)

    # The engine alone stops: its API server still answers /health, and must not count as alive.
    _, under = server_of(root)
    (engine,) = (pid for pid in under if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(engine, signal.SIGSTOP)
    wait_until(lambda: restarts(root), START_S, process)
    output, _ = process.communicate(timeout=2 * START_S)
    assert process.returncode == 0, output
    assert restarts(root) == [("inference", "gave no sign of life (launch.frozen_s) and was killed")]
    assert not any(map(is_alive, under))
    assert [row["step"] for row in rows(root)] == list(range(1, 21))
    assert [row["step"] for row in rows(root, "orchestrator")] == list(range(1, 21))
    assert "0 skipped, 0 duplicated" in run("ckpt", "audit", root)
    # What the server says of its tokens is what the trainer computes for them.
    assert all(abs(row["policy/mismatch_kl"]) < 0.02 for row in rows(root))


class Own:
    """A vLLM that a user started, with some of the arguments that training needs."""

    def __init__(self, python, log, *arguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--load-format", "dummy"),
            *("--host", "127.0.0.1", "--port", port, "--max-model-len", 64, "--max-num-seqs", 16),
            *("--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"),
            *("--max-num-batched-tokens", 4096, *arguments),
        ]
        extra = {"VLLM_CPU_KVCACHE_SPACE": 1, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": 1}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=environment(**extra),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.log = log

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


NEEDED = (
    *("--enable-scale-out", "--middleware", "ratchet.inference.vllm.front.Front"),
    *("--weight-transfer-config", '{"backend": "ratchet"}', "--logprobs-mode", "processed_logprobs"),
    *("--generation-config", "vllm"),
)
ABROAD = (
    *("--trainer", "@", "examples/reverse_text/train.toml"),
    *("--orchestrator", "@", "examples/reverse_text/orch.toml", *SMALL[2:]),
)


@pytest.mark.parametrize(
    ("given", "lacks"),
    [((), "without --middleware"), (NEEDED[1:], "without --enable-scale-out: "), (NEEDED, None)],
    ids=["plain", "almost", "whole"],
)
def test_a_vllm_of_the_users_own_serves_or_is_told_what_it_lacks(python, tmp_path, given, lacks):
    own = Own(python, tmp_path / "own.log", *given)
    client = ("--orchestrator.client.base-url", own.url, "--orchestrator.client.wait-s", START_S)
    command = (*ABROAD, "--max-steps", "2", "--output-dir", tmp_path / "run", *client)
    try:
        if lacks is None:
            said = run("rl", *command)
            assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
        else:
            said = run("rl", *command, code=2)
            assert f"The server at {own.url} is vLLM" in said
            assert lacks in said
            assert len(said.strip().splitlines()) == 1, said
    finally:
        own.stop()
