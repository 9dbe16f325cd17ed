"""The trainer on two nodes, each with a launcher of its own, here on one machine: any of them may die or be stopped."""

import signal
import socket

import pytest

from programs import TINY_SFT, kill, last_step, outcome, processes_of, run, run_digest, start, wait_until
from ratchet import attempts, durable
from ratchet.paths import RunPaths

SFT = (*TINY_SFT, "--max-steps", "8")
KEEP = ("--ckpt.interval", "2")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The same two ranks on one node, which nobody disturbs."""
    root = tmp_path_factory.mktemp("calm") / "run"
    run("sft", *SFT, *KEEP, "--trainer.nproc", "2", "--output-dir", root)
    return root


class Cluster:
    """Two nodes that see one run directory."""

    def __init__(self, root, address):
        self.root = root
        self._flags = ("--trainer.nnodes", "2", "--trainer.rendezvous", address, "--output-dir", root)

    def node(self, number, **extra):
        return start("sft", *SFT, *KEEP, *self._flags, "--trainer.node-rank", number, **extra)

    def both(self, **extra):
        return self.node(0), self.node(1, **extra)

    def reach(self, step, process):
        wait_until(lambda: last_step(self.root) >= step, timeout_s=280, process=process)


def end(process, code):
    said, _ = process.communicate(timeout=280)
    assert process.returncode == code, said
    return said


@pytest.mark.campaign
def test_two_nodes_take_the_steps_of_two_ranks_also_when_one_is_killed(calm, tmp_path, address):
    cluster = Cluster(tmp_path / "run", address)
    first, second = cluster.both()
    cluster.reach(2, first)
    kill(second)  # a node is gone, with its ranks
    second = cluster.node(1)
    assert "Waiting for 1 more node" in end(first, 0)
    assert f"node 1 joins attempt 1 of {cluster.root}" in end(second, 0)
    (restart,) = attempts.newest(RunPaths(cluster.root)).restarts
    assert (restart.role, restart.incarnation) == ("trainer", 2)
    assert run_digest(cluster.root) == run_digest(calm)


@pytest.mark.campaign
def test_the_node_that_decides_is_killed_and_the_other_follows_it_into_the_next_attempt(
    calm, tmp_path, address
):
    cluster = Cluster(tmp_path / "run", address)
    first, second = cluster.both()
    cluster.reach(4, first)
    kill(first)
    first = cluster.node(0)
    said = end(first, 0)
    assert "Continuing at step" in said
    assert f"node 1 joins attempt 2 of {cluster.root}" in end(second, 0)
    assert run_digest(cluster.root) == run_digest(calm)
    assert not processes_of(cluster.root)


@pytest.mark.campaign
def test_a_rank_that_fails_on_one_node_ends_the_incarnation_on_both(calm, tmp_path, address):
    cluster = Cluster(tmp_path / "run", address)
    first = cluster.node(0)
    second = cluster.node(1, RATCHET_CRASH_AT="checkpoint.after_shards:3")
    end(first, 0)
    assert "the ranks of this node ended with exit code -9" in end(second, 0)
    assert len(attempts.newest(RunPaths(cluster.root)).restarts) == 1
    assert run_digest(cluster.root) == run_digest(calm)


@pytest.mark.campaign
def test_a_node_that_is_asked_to_stop_stops_all_and_the_same_commands_continue(calm, tmp_path, address):
    cluster = Cluster(tmp_path / "run", address)
    first, second = cluster.both()
    cluster.reach(1, first)
    second.send_signal(signal.SIGTERM)
    end(second, 75)
    end(first, 75)
    assert outcome(cluster.root)["code"] == 75
    assert list(durable.committed(cluster.root / "checkpoints"))[-1] == last_step(cluster.root)
    first, second = cluster.both()
    end(first, 0)
    end(second, 0)
    assert run_digest(cluster.root) == run_digest(calm)


def test_a_node_with_another_layout_or_nothing_to_join_is_refused(tmp_path, address):
    command = (*SFT, "--trainer.nnodes", "2", "--output-dir", tmp_path / "run")
    assert "need trainer.rendezvous = 'HOST:PORT'" in run("sft", *command, code=2)
    joining = (*command, "--trainer.rendezvous", address, "--trainer.node-rank", "1", "--launch.join-s", "1")
    assert "--trainer.node-rank 0 on the first node" in run("sft", *joining, code=2)
