"""The scheduler by hand-worked cases and by random histories."""

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet.errors import RatchetError
from ratchet.orchestrator.scheduler import EnvShare, Rules, Scheduler
from ratchet.records import Sample, VersionSpan

ENVS = (EnvShare("a", 1.0, 5), EnvShare("b", 2.0, 3))


def rules(**more):
    given = {
        "seed": 7,
        "groups_per_batch": 2,
        "max_steps": 4,
        "max_async_level": 1,
        "max_off_policy_steps": 2,
    }
    return Rules(**(given | more))


def samples(draw, policy, count=2):
    return [
        Sample(
            env=draw.env,
            task=str(draw.row),
            draw=draw.draw,
            rollout=rollout,
            token_ids=[1, 2, 3],
            mask=[False, True, True],
            logprobs=[0.0, -0.1, -0.7],
            versions=[VersionSpan(policy, 1, 3)],
            reward=0.25 * rollout,
            advantage=0.0,
            finish_reason="stop",
        )
        for rollout in range(count)
    ]


def start_all(scheduler, policy):
    draws = []
    while (draw := scheduler.start(policy)) is not None:
        draws.append(draw)
    return draws


def start_one(scheduler):
    draw = scheduler.start(0)
    assert draw is not None
    return draw.draw


def read(scheduler):
    return msgspec.json.decode(scheduler.state())


def test_environments_are_drawn_in_proportion_to_their_weights():
    scheduler = Scheduler(rules(groups_per_batch=9, max_async_level=0), ENVS)
    # (n+1)/weight: a 1.0, b 0.5 -> b; a 1.0, b 1.0 -> a (first in order); a 2.0, b 1.0 -> b; and again.
    assert [draw.env for draw in start_all(scheduler, 0)] == ["b", "a", "b"] * 3


def test_every_epoch_draws_each_row_once_and_epochs_differ():
    scheduler = Scheduler(rules(groups_per_batch=10, max_async_level=0), [EnvShare("a", 1.0, 5)])
    rows = [draw.row for draw in start_all(scheduler, 0)]
    assert sorted(rows[:5]) == sorted(rows[5:]) == [0, 1, 2, 3, 4]
    assert rows[:5] != rows[5:]


def test_sampling_runs_ahead_by_the_async_level_and_no_further():
    scheduler = Scheduler(rules(), ENVS)
    assert start_all(scheduler, -1) == []  # the server holds no policy of ours yet
    assert [draw.draw for draw in start_all(scheduler, 0)] == [0, 1, 2, 3]
    assert [draw.draw for draw in start_all(scheduler, 1)] == [4, 5]


def test_nothing_is_drawn_for_batches_past_max_steps():
    scheduler = Scheduler(rules(max_steps=2), ENVS)
    assert len(start_all(scheduler, 50)) == 4


def test_a_batch_takes_the_first_finished_groups_in_the_order_of_their_draws():
    scheduler = Scheduler(rules(), ENVS)
    draws = start_all(scheduler, 0)
    scheduler.finish(3, samples(draws[3], 0), {})
    assert scheduler.take_batch() is None
    scheduler.finish(1, samples(draws[1], 0), {})
    batch = scheduler.take_batch()
    assert batch is not None
    assert [group.draw for group in batch.groups] == [1, 3]
    assert (scheduler.progress.step, scheduler.progress.total_problems) == (1, 2)
    assert (scheduler.progress.total_samples, scheduler.progress.total_tokens) == (4, 12)


def test_a_group_trains_on_two_survivors_and_is_dropped_below_that():
    scheduler = Scheduler(rules(), ENVS)
    draws = start_all(scheduler, 0)
    scheduler.finish(0, samples(draws[0], 0, count=1), {"env_error": 2})
    scheduler.finish(1, samples(draws[1], 0, count=2), {"env_error": 1})
    scheduler.finish(2, samples(draws[2], 0, count=3), {})
    batch = scheduler.take_batch()
    assert batch is not None
    assert [group.draw for group in batch.groups] == [1, 2]
    assert batch.dropped == {"env_error": 3, "no_siblings": 1}
    state = read(scheduler)
    assert state["dropped"] == {"failed": 1}
    assert state["drops_of_batch"] == [[0, "failed"]]


def test_a_dropped_group_is_replaced_by_a_new_draw():
    scheduler = Scheduler(rules(), ENVS)
    start_all(scheduler, 0)
    scheduler.finish(0, [], {"env_error": 2})
    assert [draw.draw for draw in start_all(scheduler, 0)] == [4]


def test_a_group_with_a_token_that_is_too_old_is_dropped_when_its_batch_is_made():
    scheduler = Scheduler(rules(groups_per_batch=1, max_steps=9, max_off_policy_steps=1), ENVS)
    draws = start_all(scheduler, 0)
    for policy in (0, 1, 2):
        draws += start_all(scheduler, policy)
        scheduler.finish(draws[-1].draw, samples(draws[-1], policy), {})
        assert scheduler.take_batch() is not None
    # Batch 3 accepts tokens of policy 2 and newer; draw 0 was sampled by policy 0.
    scheduler.finish(draws[0].draw, samples(draws[0], 0), {})
    assert scheduler.take_batch() is None
    assert read(scheduler)["drops_since"] == [[0, "too_old"]]


def test_a_deterministic_batch_is_its_own_draws_whatever_finishes_first():
    scheduler = Scheduler(rules(deterministic=True), ENVS)
    draws = start_all(scheduler, 0)
    assert [draw.draw for draw in draws] == [0, 1]
    scheduler.finish(1, samples(draws[1], 0), {})
    assert scheduler.take_batch() is None
    scheduler.finish(0, [], {"env_error": 2})
    batch = scheduler.take_batch()
    assert batch is not None
    assert [group.draw for group in batch.groups] == [1]
    # Batch 1 is sampled by policy 0 too, batch 2 by policy 1 and no other.
    for draw in start_all(scheduler, 0):
        scheduler.finish(draw.draw, samples(draw, 0), {})
    assert scheduler.take_batch() is not None
    assert start_all(scheduler, 0) == []
    assert start_all(scheduler, 2) == []
    assert [draw.draw for draw in start_all(scheduler, 1)] == [4, 5]


def test_a_deterministic_batch_without_survivors_stops_with_a_sentence():
    scheduler = Scheduler(rules(deterministic=True), ENVS)
    for draw in start_all(scheduler, 0):
        scheduler.finish(draw.draw, [], {"env_error": 2})
    with pytest.raises(RatchetError, match=r"No group of batch 0 survived \(env_error: 4\)"):
        scheduler.take_batch()


def test_an_environment_that_always_fails_stops_the_run():
    scheduler = Scheduler(rules(), ENVS)
    for _ in range(49):
        scheduler.finish(start_one(scheduler), [], {"env_error": 2})
    last = start_one(scheduler)
    with pytest.raises(RatchetError, match=r"50 groups failed while batch 0 was made \(env_error: 100\)"):
        scheduler.finish(last, [], {"env_error": 2})


@pytest.mark.parametrize(
    ("failures", "remedy"),
    [
        ({"env_error": 1, "too_long": 3}, "raise inference.max_model_len"),
        ({"env_error": 3, "too_long": 1}, "its errors are in the orchestrator's log"),
        ({"bad_score": 4}, "scores that are not finite"),
        ({"sandbox_lost": 4}, "returned by the environment"),
    ],
)
def test_the_remedy_is_that_of_the_most_frequent_failure(failures, remedy):
    scheduler = Scheduler(rules(deterministic=True), ENVS)
    for draw in start_all(scheduler, 0):
        scheduler.finish(draw.draw, [], failures)
    counts = ", ".join(f"{reason}: {2 * n}" for reason, n in sorted(failures.items()))
    with pytest.raises(RatchetError, match=rf"\({counts}\), and .*{remedy}") as stopped:
        scheduler.take_batch()
    assert ("log" in str(stopped.value)) == (
        max(failures, key=lambda reason: failures[reason]) == "env_error"
    )


def test_a_new_environment_does_not_have_to_catch_up_with_the_others():
    scheduler = Scheduler(rules(groups_per_batch=30, max_async_level=0), ENVS[:1])
    start_all(scheduler, 0)
    longer = Scheduler(rules(groups_per_batch=36, max_async_level=0), (ENVS[0], EnvShare("c", 1.0, 4)))
    longer.restore(scheduler.state())
    new = [draw for draw in start_all(longer, 0) if draw.draw >= 30]
    assert [draw.env for draw in new] == ["a", "c"] * 3
    assert [draw.count for draw in new] == [30, 0, 31, 1, 32, 2]


def test_running_draws_of_a_removed_environment_are_dropped_with_a_reason():
    scheduler = Scheduler(rules(), ENVS)
    start_all(scheduler, 0)  # b a b b
    other = Scheduler(rules(), ENVS[:1])
    other.restore(scheduler.state())
    assert read(other)["dropped"] == {"env_removed": 3}
    assert [(draw.draw, draw.env) for draw in start_all(other, 0)] == [(1, "a"), (4, "a"), (5, "a"), (6, "a")]


@st.composite
def histories(draw):
    return {
        "deterministic": draw(st.booleans()),
        "groups_per_batch": draw(st.integers(1, 4)),
        "max_steps": draw(st.integers(1, 6)),
        "max_async_level": draw(st.integers(0, 2)),
        "choices": draw(st.lists(st.integers(0, 10**6), min_size=20, max_size=200)),
    }


class Play:
    """A run of the scheduler under a list of choices; policies appear as batches do."""

    def __init__(self, history):
        self.rules = rules(
            deterministic=history["deterministic"],
            groups_per_batch=history["groups_per_batch"],
            max_steps=history["max_steps"],
            max_async_level=history["max_async_level"],
        )
        self.scheduler = Scheduler(self.rules, ENVS)
        self.policy = 0
        self.running = {}
        self.drawn, self.trained, self.batches = Counter(), Counter(), []

    def act(self, choice):
        self.start()
        if self.running and choice % 3:
            draw = self.running.pop(sorted(self.running)[choice // 3 % len(self.running)])
            survivors = 0 if choice % 7 == 0 and draw.draw % self.rules.groups_per_batch else 2
            self.scheduler.finish(draw.draw, samples(draw, self.policy, survivors), {"x": 2 - survivors})
        elif self.policy < self.scheduler.next_batch and (not self.rules.deterministic or not self.running):
            required = self.rules.required_policy(self.scheduler.next_batch)
            self.policy = required if self.rules.deterministic else self.policy + 1
        if (batch := self.scheduler.take_batch()) is not None:
            self.batches.append([group.draw for group in batch.groups])
            self.trained.update(group.draw for group in batch.groups)

    def start(self):
        for draw in start_all(self.scheduler, self.policy):
            self.drawn[draw.draw] += 1
            self.running[draw.draw] = draw

    def check_ledger(self):
        """Every draw is in exactly one place."""
        state = read(self.scheduler)
        held = [d["draw"] for d in state["running"]] + [g["draw"] for g in state["ready"]]
        since = [draw for draw, _ in state["drops_since"]]
        assert len(held) == len(set(held))
        assert state["next_draw"] == len(self.trained) + sum(state["dropped"].values()) + len(held)
        assert not set(held) & set(self.trained)
        assert not set(since) & (set(held) | set(self.trained))
        assert all(count == 1 for count in self.trained.values())


@given(histories())
@settings(max_examples=60, deadline=None)
def test_every_draw_is_trained_once_dropped_with_a_reason_or_held(history):
    play = Play(history)
    for choice in history["choices"]:
        play.act(choice)
        play.check_ledger()
    assert all(count == 1 for count in play.drawn.values())
    assert sorted(play.drawn) == list(range(len(play.drawn)))
    if history["deterministic"]:
        size = history["groups_per_batch"]
        for step, draws in enumerate(play.batches):
            assert set(draws) <= set(range(step * size, (step + 1) * size))
    else:
        assert all(len(draws) == history["groups_per_batch"] for draws in play.batches)


@given(histories(), st.integers(0, 199))
@settings(max_examples=60, deadline=None)
def test_a_restored_scheduler_has_the_same_future(history, cut):
    """Killed after a batch, with its running draws played again, it makes the batches it would have made."""
    choices = history["choices"]
    play = Play(history)
    for choice in choices[:cut]:
        play.act(choice)
    state = play.scheduler.state()
    again = Scheduler(play.rules, ENVS)
    again.restore(state)
    assert again.state() == state
    restored = Play(history)
    restored.scheduler, restored.policy = again, play.policy
    # Running draws are started again, in order, and are the same draws.
    restored.start()
    play.start()
    assert restored.running == play.running
    for choice in choices[cut:]:
        play.act(choice)
        restored.act(choice)
        assert restored.scheduler.state() == play.scheduler.state()
