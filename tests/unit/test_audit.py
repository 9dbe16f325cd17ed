"""The audit on a run made by hand: five draws in one batch's time, each with another fate."""

import shutil

import msgspec
import pytest

from ratchet import batchlog, ledger, metrics
from ratchet.audit import audit
from ratchet.paths import RunPaths
from ratchet.records import Sample
from ratchet.stage import Stage

HELD = {
    "running": [{"draw": 3, "env": "b", "count": 1, "row": 0}],
    "dropped": {"failed": 1},
    "drops_of_batch": [[2, "failed"]],
    "envs": [{"label": "a", "drawn": 3}, {"label": "b", "drawn": 2}],
}


def sample(draw, env):
    return Sample(
        env=env,
        task=f"train/{draw}",
        draw=draw,
        rollout=0,
        token_ids=[1, 2],
        mask=[False, True],
        logprobs=[0.0, -0.5],
        versions=[],
        reward=1.0,
        advantage=0.0,
        finish_reason="stop",
    )


ROW = {"step": 1, "progress/total_samples": 2, "progress/total_tokens": 4}


def publish(stage, samples=None, **more):
    """Batch 0; `more` changes the state."""
    totals = {"step": 1, "total_samples": 2, "total_tokens": 4, "total_problems": 2}
    ready = [{"draw": 4, "samples": [msgspec.to_builtins(sample(4, "a"))]}]
    state = {"progress": totals, "next_draw": 5, "ready": ready, **HELD, **more}
    batchlog.publish(
        stage,
        step=0,
        attempt=1,
        samples=samples or [sample(0, "a"), sample(1, "b")],
        state=msgspec.json.encode(state),
        metrics=ROW,
        oldest_served=0,
    )


@pytest.fixture
def make(tmp_path):
    """Draws 0 and 1 are trained, 2 dropped, 3 running, 4 ready; `more` changes the state."""

    def made(**more):
        paths = RunPaths(tmp_path)
        for directory in (paths.staging, paths.batches, paths.metrics):
            directory.mkdir()
        stage = Stage.open(paths, "001.orchestrator.1")
        publish(stage, **more)
        metrics.append(stage, paths.metric("orchestrator"), ROW)
        ledger.append(stage, ledger.line_of(paths, 0))
        return paths

    return made


def test_every_draw_is_accounted_for_per_environment(make):
    report = audit(make())
    assert report.findings == []
    assert (report.draws, report.trained, report.in_flight, report.dropped) == (5, 2, 2, {"failed": 1})
    a, b = report.envs["a"], report.envs["b"]
    assert (a.drawn, a.trained, a.in_flight, a.dropped) == (3, 1, 1, 1)
    assert (b.drawn, b.trained, b.in_flight, b.dropped) == (2, 1, 1, 0)
    assert report.ledger_range == report.batch_range == (0, 0)


WRONG = [
    ("a draw that nobody knows", {"next_draw": 6}, "skipped", [5]),
    ("trained and in flight", {"running": [{"draw": 1, "env": "b"}]}, "duplicated", [1]),
    ("dropped and in flight", {"running": [{"draw": 2, "env": "b"}]}, "duplicated", [2]),
    ("dropped twice", {"drops_of_batch": [[2, "failed"], [2, "too_old"]]}, "duplicated", [2]),
    ("a drop that is not counted", {"dropped": {}}, "dropped", []),
    ("a draw of the future", {"running": [{"draw": 9, "env": "b"}]}, "draws", [9]),
    ("an environment with too many", {"envs": [{"label": "a", "drawn": 1}]}, "environment", []),
]


@pytest.mark.parametrize(("more", "what", "draws"), [case[1:] for case in WRONG], ids=[c[0] for c in WRONG])
def test_what_does_not_reconcile_is_named(make, more, what, draws):
    found = [finding for finding in audit(make(**more)).findings if finding.what == what]
    assert found
    assert found[0].draws == draws


def test_wrong_totals_are_named(make):
    paths = make()
    row = {"step": 1, "progress/total_samples": 3, "progress/total_tokens": 4}
    paths.metric("trainer").write_bytes(msgspec.json.encode(row) + b"\n")
    (finding,) = audit(paths).findings
    assert "trainer's row of step 1 states total_samples 3, the ledger adds up to 2" in finding.detail


def test_a_batch_that_was_published_anew_with_another_logprob_is_named(make):
    paths = make()
    changed = msgspec.structs.replace(sample(0, "a"), logprobs=[0.0, -0.25])
    shutil.rmtree(paths.batch(0))
    publish(Stage.open(paths, "002.orchestrator.1"), [changed, sample(1, "b")])
    (finding,) = audit(paths).findings
    assert "the line of batch 0 is not what the batch holds: another token, logprob" in finding.detail


def test_a_batch_whose_line_was_not_appended_yet_is_no_problem(make):
    paths = make()
    paths.ledger.unlink()
    report = audit(paths)
    assert report.findings == []
    assert any("the next start appends it" in note for note in report.notes)
    assert (report.trained, report.skipped) == (2, 0)


def test_without_a_state_it_says_what_it_cannot_prove(make):
    paths = make()
    for path in paths.batch(0).iterdir():
        path.unlink()
    paths.batch(0).rmdir()
    report = audit(paths)
    assert any("what was in flight is not known" in note for note in report.notes)
    assert report.skipped == 0
