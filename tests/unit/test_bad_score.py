"""A score that no batch can be made of is a counted failure, when it is given and when a journal holds it."""

from types import SimpleNamespace

import pytest

from ratchet.attempts import Assignment, Plan
from ratchet.chat import Chat
from ratchet.config import RLConfig
from ratchet.envs.base import Environment, Score, Task
from ratchet.orchestrator import batches
from ratchet.orchestrator.calls import Completion
from ratchet.orchestrator.finished import Finished
from ratchet.orchestrator.play import BAD_SCORE, LARGEST_REWARD, Place, Player, Sampling
from ratchet.orchestrator.scheduler import Batch, Group
from ratchet.paths import RunPaths
from ratchet.records import Progress, RolloutFailure, Sample
from ratchet.stage import Stage

PLACE = Place("rollout", "e", 0, 0)
BAD = [
    (1e308, {}),
    (-1e13, {}),
    (float("nan"), {}),
    (float("inf"), {}),
    (1.0, {"words": 1e308}),
    (1.0, {"words": float("nan")}),
]
GOOD = [(0.0, {}), (LARGEST_REWARD, {"nanoseconds": 1.8e18}), (-LARGEST_REWARD, {})]


class Scored(Environment):
    size = 1

    def __init__(self, score):
        self.score = score

    def task(self, index, split):
        return Task("train/0")

    def messages(self, task):
        return [{"role": "user", "content": "a"}]

    def step(self, task, transcript):
        return self.score


class Pool:
    """A server that answers every prompt with one token."""

    max_model_len = None

    async def generate(self, request, group, policy):
        return Completion([5], [-0.5], [], "stop"), []


def sample(reward, metrics=None):
    return Sample(
        env="e",
        task="train/0",
        draw=0,
        rollout=0,
        token_ids=[1, 2],
        mask=[False, True],
        logprobs=[0.0, -0.5],
        versions=[],
        reward=reward,
        advantage=0.0,
        finish_reason="stop",
        metrics=metrics or {},
    )


async def played(reward, metrics):
    guard = SimpleNamespace(check=lambda: None)
    player = Player(Chat.load("examples/reverse_text/model"), Pool(), guard, seed=0, replays=0)
    opening = await player.open(Scored(Score(reward, metrics)), 0, "train")
    return await player.play(opening, PLACE, Sampling(seed=0, max_tokens=1, temperature=1.0))


@pytest.mark.parametrize(("reward", "metrics"), BAD)
async def test_when_it_is_given(reward, metrics):
    outcome = await played(reward, metrics)
    assert isinstance(outcome, RolloutFailure)
    assert outcome.reason == BAD_SCORE
    assert f"reward {reward}" in outcome.detail


@pytest.mark.parametrize(("reward", "metrics"), GOOD)
async def test_what_is_large_and_can_be_used_is_used(reward, metrics):
    outcome = await played(reward, metrics)
    assert (outcome.reward, outcome.metrics) == (reward, metrics)


@pytest.fixture
def journal(tmp_path):
    """A journal as each process opens it."""
    paths = RunPaths(tmp_path)
    for directory in (paths.staging, paths.journal):
        directory.mkdir()
    config = RLConfig.model_validate(
        {
            "model": {"name": "examples/reverse_text/model"},
            "max_steps": 1,
            "orchestrator": {"env": [{"id": "reverse_text", "name": "e"}]},
        }
    )

    def opened(incarnation):
        stage = Stage.open(paths, f"001.orchestrator.{incarnation}")
        run = Assignment(
            paths=paths, config=config, plan=Plan(), attempt=1, run_id="x", lineage=0, stage=stage
        )
        target = SimpleNamespace(name="x/0/0/d")
        return Finished(run, "inputs", target, unsettled={0})

    return opened


@pytest.mark.parametrize(("reward", "metrics"), BAD)
def test_when_an_older_version_left_it_in_the_journal(journal, reward, metrics):
    """It was found there and ended the run again, whatever was repaired."""
    before = journal(1)
    before.keep(PLACE, sample(reward, metrics))
    before.keep(PLACE._replace(rollout=1), sample(1.0))
    before.write()
    after = journal(2)
    assert after.find(PLACE).reason == BAD_SCORE
    assert after.find(PLACE._replace(rollout=1)).reward == 1.0
    assert after.replayed == 2


@pytest.mark.parametrize("divide_by_std", [False, True])
def test_a_batch_of_the_largest_can_be_made(divide_by_std):
    """1024 groups of +1e12 and -1e12: the mean is 0, the deviation 1e12; what is summed is far from any limit."""
    pair = [sample(LARGEST_REWARD, {"a": 1e150}), sample(-LARGEST_REWARD, {"a": 1e150})]
    groups = [Group(draw, pair) for draw in range(1024)]
    made = batches.credited(groups, divide_by_std=divide_by_std)
    assert made[0].advantage == pytest.approx(1.0 if divide_by_std else LARGEST_REWARD)
    batch = Batch(step=0, groups=groups, dropped={})
    row = batches.exact_row(batch, made, Progress())
    assert (row["reward/mean"], row["reward/std"]) == (0.0, LARGEST_REWARD)
    assert row["env/e/a"] == pytest.approx(1e150)
