"""`trainer --replay`: a run is trained again from its batches, and a lie in it is found."""

import json
import shutil

import pytest

from programs import run
from ratchet.paths import RunPaths

ALONE = (
    *("@", "examples/reverse_text/rl.toml", "--model.name", "examples/reverse_text/model"),
    *("--model.random-init", "--orchestrator.batch-size", "16", "--orchestrator.group-size", "4"),
    *("--orchestrator.sampling.max-tokens", "6", "--orchestrator.eval.tasks", "8", "--inference.slots", "16"),
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An asynchronous run in two attempts, with another learning rate in the second."""
    root = tmp_path_factory.mktemp("replayed") / "run"
    run("rl", *ALONE, "--output-dir", root, "--max-steps", "4", "--ckpt.interval", "2")
    more = ("--ckpt.interval", "2", "--ckpt.resume-step", "-1", "--trainer.optim.lr", "1e-4")
    said = run("rl", *ALONE, "--output-dir", root, "--max-steps", "8", *more)
    assert "trainer.optim.lr: 0.0005 -> 0.0001" in said
    return root


def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_an_asynchronous_run_is_a_function_of_its_batches_and_replay_writes_nothing(finished):
    before = {p: p.stat().st_mtime_ns for p in sorted(finished.rglob("*"))}
    said = run("trainer", "--replay", finished)
    assert {p: p.stat().st_mtime_ns for p in sorted(finished.rglob("*"))} == before
    assert "steps 0 to 8 trained again: 8 rows and 4 checkpoints compared, 0 different" in said


def test_a_run_on_a_gpu_is_not_replayed_without_one(finished, tmp_path):
    root = copy(finished, tmp_path)
    note = RunPaths(root).device(2, "trainer")
    note.write_text(note.read_text().replace('"cpu"', '"cuda"'))
    said = run("trainer", "--replay", root, code=2, CUDA_VISIBLE_DEVICES="")
    assert "a CPU gives other bits" in said


def test_a_row_that_does_not_follow_from_the_batches_is_found(finished, tmp_path):
    root = copy(finished, tmp_path)
    path = RunPaths(root).metric("trainer")
    lines = path.read_text().splitlines()
    row = json.loads(lines[4])
    lines[4] = json.dumps(row | {"loss": row["loss"] + 1e-6})
    path.write_text("\n".join(lines) + "\n")
    said = run("trainer", "--replay", root, code=1)
    assert "row 5: loss" in said
    assert "1 different" in said


@pytest.mark.slow
def test_where_batches_are_gone_it_begins_at_the_oldest_checkpoint_that_is_followed_by_all(
    finished, tmp_path
):
    root = copy(finished, tmp_path)
    shutil.rmtree(RunPaths(root).batch(2))
    assert "steps 4 to 8 trained again" in run("trainer", "--replay", root)
    shutil.rmtree(RunPaths(root).batch(7))
    assert "cannot be replayed" in run("trainer", "--replay", root, code=2)
