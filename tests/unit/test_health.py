"""Warnings and waits, worked by hand."""

import pytest

from ratchet.report import health
from ratchet.report.health import Limits, check
from ratchet.report.waits import Facts, Wait, stall, waits


def rows(name, values, **other):
    return [{"step": step, name: value, **other} for step, value in enumerate(values, start=1)]


def warn(trainer=(), orchestrator=(), **limits):
    return [(w.key, w.step) for w in check(trainer, orchestrator, Limits(**limits))]


def test_a_trailing_mean_stands_at_its_last_step():
    assert health.smooth([(1, 1.0), (2, 2.0), (3, 6.0)], 2) == [(2, 1.5), (3, 4.0)]


def test_a_reward_that_falls_back_by_more_than_half_of_its_gain_is_a_collapse():
    # Means of 5: 0.2 at step 5, 0.8 at step 15, then 0.8, 0.66, 0.52, 0.38: below 0.8 - 0.3 at the third low step.
    values = [0.2] * 5 + [0.3, 0.4, 0.5, 0.6, 0.7] + [0.8] * 5 + [0.1] * 5
    assert warn(orchestrator=rows("reward/mean", values)) == [("reward_collapse", 18)]


def test_a_reward_that_is_noisy_or_grows_is_no_collapse():
    assert warn(orchestrator=rows("reward/mean", [0.1 * i for i in range(20)])) == []
    assert warn(orchestrator=rows("reward/mean", [0.4, 0.6] * 10)) == []
    assert warn(orchestrator=rows("reward/mean", [0.0] * 20)) == []


def test_entropy_near_zero_is_a_collapse_only_where_the_groups_no_longer_differ():
    entropy = rows("policy/entropy", [1.0] * 10 + [0.01] * 10)
    # The mean of 5 falls below 0.1 when all five are low: at step 15.
    equal = rows("reward/equal_groups", [0.6] * 20)
    assert ("entropy_collapse", 15) in warn(entropy, equal)
    assert warn(entropy, rows("reward/equal_groups", [0.1] * 20)) == []


def test_a_kl_that_leaves_its_usual_height_is_said_once():
    # Means of 3 with the first value above: (0.01 + 0.01 + 0.5) / 3 = 0.173 > 0.1 and > 5 * 0.01.
    assert warn(rows("policy/mismatch_kl", [0.01] * 12 + [0.5] * 6)) == [("kl_blow_up", 13)]
    assert warn(rows("policy/mismatch_kl", [0.001] * 12 + [0.02] * 6)) == []


def test_groups_that_teach_nothing():
    values = [0.5] * 5 + [0.95] * 5
    # Means: 0.5, 0.59, 0.68, 0.77, 0.86 at step 9.
    assert warn(orchestrator=rows("reward/equal_groups", values)) == [("equal_groups", 9)]


def test_staleness_that_grows_towards_the_limit():
    values = [1.0] * 10 + [5.0] * 5
    # Means from step 11: 1.8, 2.6, 3.4, 4.2: above 4, half of the limit of 8, at step 14.
    assert warn(orchestrator=rows("policy/off_policy_steps", values)) == [("growing_staleness", 14)]
    assert warn(orchestrator=rows("policy/off_policy_steps", values), max_off_policy_steps=20) == []


def test_an_environment_that_takes_most_of_the_time():
    slow = [{"step": s, "time/env_s": 60.0, "time/rollouts_s": 100.0} for s in range(1, 8)]
    assert warn(orchestrator=slow) == [("slow_env", 5)]
    assert warn(orchestrator=[row | {"time/env_s": 0.9, "time/rollouts_s": 1.0} for row in slow]) == []


def test_rollouts_that_are_dropped_are_named_by_their_main_reason():
    lossy = rows("rollouts/trained", [60] * 6)
    lossy = [row | {"rollouts/dropped/too_long": 30, "rollouts/dropped/env_error": 10} for row in lossy]
    (warning,) = check((), lossy, Limits())
    assert (warning.key, warning.step) == ("dropped_rollouts", 5)
    assert warning.text == "40% of the rollouts are dropped, most for too_long"


def test_every_warning_names_a_remedy_and_comes_once():
    found = check((), rows("reward/equal_groups", [1.0] * 50), Limits())
    assert len(found) == 1
    assert "group_size" in found[0].remedy
    assert str(found[0]).startswith("step 5: 100% of the groups")


RL = {"kind": "rl", "max_steps": 20, "max_async_level": 1}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        # Batch 7 is made by policies 6 and later, and 6 is there: the server is at work, the trainer has nothing.
        (
            Facts(**RL, trained=7, logged=7, published=7, served=7, in_flight=12),
            [
                Wait("trainer", "orchestrator", "batch 7 is not published yet"),
                Wait("orchestrator", "inference", "12 rollouts are in flight for batch 7"),
            ],
        ),
        # Batch 8 needs policy 7, which is being trained from batch 6.
        (
            Facts(**RL, trained=6, logged=8, published=6, served=6),
            [Wait("orchestrator", "trainer", "batch 8 needs policy 7, the newest is 6")],
        ),
        (
            Facts(**RL, trained=20, logged=20, published=20, evaluating=20, saving=20),
            [
                Wait("trainer", "disk", "checkpoint 20 is being written"),
                Wait("orchestrator", "inference", "policy 20 is being evaluated"),
            ],
        ),
        (Facts(kind="sft", max_steps=20, trained=6), []),
    ],
)
def test_who_waits_for_whom(facts, expected):
    assert waits(facts) == expected


def test_a_stall_is_ten_usual_steps_and_at_least_a_minute_without_a_sign():
    calm = Facts(**RL, trained=7, logged=7, published=7, in_flight=3, quiet_s=59, usual_s=1)
    assert stall(calm) is None
    long_steps = Facts(**RL, trained=7, logged=8, published=7, quiet_s=299, usual_s=30)
    assert stall(long_steps) is None
    said = stall(Facts(**RL, trained=7, logged=7, published=7, in_flight=3, quiet_s=61, usual_s=1))
    assert said == (
        "Nothing was published for 61 s, a step usually takes 1.0 s: the trainer waits for the orchestrator (batch 7 "
        "is not published yet); the orchestrator waits for the inference (3 rollouts are in flight for batch 7)."
    )
