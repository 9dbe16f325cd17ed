"""The Weights & Biases sink, against a stand-in for its package that keeps its rule: no step is taken twice."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from ratchet.report.tracker.wandb import WandbSink


class Run:
    def __init__(self, settings):
        self.settings, self.points, self.is_finished = settings, [], False

    def define_metric(self, name, step_metric):
        self.axis = (name, step_metric)

    def log(self, values, step=None):
        if step is None or not self.points or step > self.points[-1][0]:
            self.points.append((step, values))

    def finish(self):
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch):
    """Runs by id: one that is opened again has its points still."""
    known = {}
    module = ModuleType("wandb")
    module.init = lambda **settings: known.setdefault(settings["id"], Run(settings))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return known


@pytest.fixture
def open_sink(tmp_path):
    from ratchet.config import SFTConfig

    config = SFTConfig.model_validate(
        {"model": {"name": "m"}, "data": {"name": "d"}, "max_steps": 9, "output_dir": str(tmp_path)}
    )
    paths = SimpleNamespace(root=tmp_path, trackers=tmp_path / "trackers")

    def sink(lineage=0):
        return WandbSink(
            SimpleNamespace(paths=paths, run_id="abc", lineage=lineage, config=config), "project"
        )

    return sink


def test_a_step_is_sent_once_with_what_both_programs_say_of_it(runs, open_sink):
    sink = open_sink()
    sink.write("orchestrator", {"step": 1, "reward/mean": 0.5})
    sink.write("trainer", {"step": 1, "loss": 2.0})
    sink.close()
    (run,) = runs.values()
    assert run.settings["group"] == "abc"
    assert run.points == [
        (1, {"trainer/step": 1, "trainer/loss": 2.0, "orchestrator/step": 1, "orchestrator/reward/mean": 0.5})
    ]
    assert run.is_finished


def test_rows_that_a_crash_makes_again_are_no_double_points(runs, open_sink):
    first = open_sink()
    for step in (1, 2, 3):
        first.write("trainer", {"step": step, "loss": 1.0})
    again = open_sink()
    again.begin(2)
    for step in (2, 3, 4):
        again.write("trainer", {"step": step, "loss": 1.0})
    assert [step for step, _ in runs["abc-0"].points] == [1, 2, 3, 4]


def test_a_rollback_is_another_curve_in_the_same_group(runs, open_sink):
    for lineage in (0, 1):
        open_sink(lineage).write("trainer", {"step": 1, "loss": float(lineage)})
    assert set(runs) == {"abc-0", "abc-1"}
    assert {run.settings["group"] for run in runs.values()} == {"abc"}


def test_evaluations_have_an_axis_of_their_own_and_none_is_lost(runs, open_sink):
    sink = open_sink()
    sink.write("evals", {"step": 0, "eval/e/reward": 0.1})
    sink.write("trainer", {"step": 1, "loss": 1.0})
    sink.write("evals", {"step": 1, "eval/e/reward": 0.2})
    sink.close()
    (run,) = runs.values()
    assert run.axis == ("eval/*", "eval/step")
    evals = [(p["eval/step"], p["eval/e/reward"]) for _, p in run.points if "eval/step" in p]
    assert evals == [(0, 0.1), (1, 0.2)]
