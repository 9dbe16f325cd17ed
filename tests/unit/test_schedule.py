"""Learning rate = f(step), by hand."""

import msgspec
import pytest

from ratchet.config import OptimConfig, SchedulerConfig, TrainerConfig
from ratchet.errors import Refusal
from ratchet.trainer import schedule


def factors(max_steps, **settings):
    config = SchedulerConfig(**settings)
    return [schedule.factor(config, max_steps, step) for step in range(max_steps)]


def test_constant_stays_at_the_peak():
    assert factors(3) == [1.0, 1.0, 1.0]


def test_warm_up_reaches_the_peak_at_its_last_update():
    assert factors(4, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


def test_linear_decays_to_the_floor_at_the_horizon():
    assert factors(4, type="linear") == [1.0, 0.75, 0.5, 0.25]
    assert factors(4, type="linear", min_lr_ratio=0.5) == [1.0, 0.875, 0.75, 0.625]


def test_cosine_is_half_way_down_in_the_middle():
    assert factors(4, type="cosine")[2] == pytest.approx(0.5)


def test_past_the_horizon_the_floor_holds():
    assert factors(6, type="linear", horizon_steps=4)[4:] == [0.0, 0.0]


def test_extending_max_steps_does_not_bend_the_past():
    short = factors(20, type="cosine", warmup_steps=3, horizon_steps=40)
    long = factors(40, type="cosine", warmup_steps=3, horizon_steps=40)
    assert long[:20] == short


def test_a_record_that_disagrees_with_unchanged_settings_is_refused():
    config = TrainerConfig(scheduler=SchedulerConfig(type="linear", horizon_steps=40))
    record = schedule.record(config, 20, 20)
    schedule.check_record(record, config, 40, 20)
    bent = msgspec.structs.replace(record, last_factor=record.last_factor * 0.9)
    with pytest.raises(Refusal, match="learning rate"):
        schedule.check_record(bent, config, 40, 20)


def test_a_record_of_other_settings_is_no_contradiction():
    old = TrainerConfig(scheduler=SchedulerConfig(type="linear"))
    new = TrainerConfig(scheduler=SchedulerConfig(type="linear"), optim=OptimConfig(lr=1e-3))
    schedule.check_record(schedule.record(old, 20, 20), new, 40, 20)
