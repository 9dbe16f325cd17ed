"""Which evaluations a run owes, while a trainer publishes policies beside it."""

import pytest

from ratchet import durable, weights
from ratchet.orchestrator import evals
from ratchet.paths import RunPaths
from ratchet.stage import Stage
from ratchet.weights import Places


@pytest.fixture
def paths(tmp_path):
    paths = RunPaths(tmp_path)
    for directory in (paths.staging, paths.weights):
        directory.mkdir()
    return paths


def publish(paths, step):
    stage = Stage.open(paths, f"{step:03d}.trainer.1")
    directory = stage.begin("weights")
    (directory / "config.json").write_text("{}")
    weights.commit(stage, directory, step=step, attempt=1)


@pytest.mark.parametrize(
    ("there", "gone"), [([], False), ([2], False), ([2, 4], False), ([4, 5], False), ([5], True)]
)
def test_a_policy_is_gone_where_only_later_ones_are_left(paths, there, gone):
    for step in there:
        publish(paths, step)
    assert evals.is_gone(Places(paths), 4) is gone


@pytest.mark.parametrize("published_after", [1, 2])
def test_a_policy_published_between_two_looks_is_not_gone(paths, monkeypatch, published_after):
    looks = []

    def watched(look):
        def wrapper(*arguments):
            found = look(*arguments)
            looks.append(found)
            if len(looks) == published_after:
                publish(paths, 4)
                publish(paths, 5)
            return found

        return wrapper

    publish(paths, 3)
    monkeypatch.setattr(durable, "steps", watched(durable.steps))
    monkeypatch.setattr(weights, "is_published", watched(weights.is_published))
    assert not evals.is_gone(Places(paths), 4)
