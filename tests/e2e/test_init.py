"""What a newcomer does: `ratchet init`, a reward function of five lines, a trained model, and a look at it."""

import os
import subprocess

from programs import BIN, environment, rows
from ratchet import metrics
from ratchet.durable import committed
from ratchet.paths import RunPaths

REWARD = '''\
def reward(completion, row):
    """Five lines that are not the template's: answers of vowels."""
    if not completion:
        return 0.0
    return sum(letter in "aeiou" for letter in completion) / len(completion)
'''
SMALL = ("--max-steps", "10", "--orchestrator.batch-size", "64", "--orchestrator.eval.interval", "10")


def command(directory, name, *arguments, code=0):
    done = subprocess.run(
        [BIN / name, *arguments],
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def test_from_init_to_a_model_that_was_trained_on_a_reward_of_five_lines(tmp_path):
    said = command(tmp_path, "ratchet", "init", "my-project")
    assert "uv run rl @ rl.toml" in said
    project = tmp_path / "my-project"
    (project / "reward.py").write_text(REWARD)
    command(project, "rl", "@", "rl.toml", *SMALL)
    run = project / "outputs" / "first"
    first, last = (row["eval/mine/reward"] for row in metrics.read(RunPaths(run).metric("evals")))
    assert last > first + 0.1
    assert len(rows(run)) == 10
    assert (run / "weights" / "step_10" / "model.safetensors").exists()
    assert list(committed(run / "checkpoints")) == [5, 10]
    assert "0 skipped" in command(project, "ckpt", "audit", "outputs/first")


def test_a_name_that_is_taken_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    said = command(tmp_path, "ratchet", "init", "taken", code=2)
    assert "exists already" in said
    assert os.listdir(tmp_path / "taken") == ["mine"]
    assert os.listdir(tmp_path) == ["taken"]
