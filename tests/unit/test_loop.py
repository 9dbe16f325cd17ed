"""The trainer's loop in this process: figures that are read while the next step is computed, as on a GPU."""

import pytest

from ratchet import metrics
from ratchet.attempts import Assignment, Plan
from ratchet.config import SFTConfig
from ratchet.errors import PoisonBatch, Stopped
from ratchet.paths import RunPaths
from ratchet.stage import Stage
from ratchet.trainer.loop import Trainer
from ratchet.trainer.update import Outcome
from training import MODEL

DATA = "examples/reverse_text/sft.jsonl"


@pytest.fixture
def late(monkeypatch):
    """Figures are read one step late."""
    monkeypatch.setattr(
        Trainer, "_reads_now", lambda self: self._is_due() or self._step == self._config.max_steps
    )


def trainer(root, world, *, is_stopping=lambda: False):
    config = SFTConfig.model_validate(
        {
            "model": MODEL,
            "max_steps": 5,
            "data": {"name": DATA, "batch_size": 4},
            "ckpt": {"interval": 3},
            "trainer": {"precision": "fp32", "optim": {"lr": 1e-2}, "device": "cpu"},
        }
    )
    paths = RunPaths(root)
    for directory in (paths.staging, paths.checkpoints, paths.metrics, paths.weights, paths.timelines):
        directory.mkdir(parents=True, exist_ok=True)
    paths.metric("trainer").touch()
    stage = Stage.open(paths, "001.trainer.1")
    return Trainer(
        Assignment(paths=paths, config=config, plan=Plan(), attempt=1, run_id="x", lineage=0, stage=stage),
        world,
        is_stopping,
    )


def exact(root):
    rows = metrics.read(RunPaths(root).metric("trainer"))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/", "fault/"))} for row in rows]


def test_figures_that_are_read_late_are_the_same_in_the_same_order(world, tmp_path, request):
    trainer(tmp_path / "now", world).run()
    request.getfixturevalue("late")
    trainer(tmp_path / "late", world).run()
    assert [row["step"] for row in exact(tmp_path / "late")] == [1, 2, 3, 4, 5]
    assert exact(tmp_path / "late") == exact(tmp_path / "now")


def test_a_row_is_there_before_its_checkpoint_and_none_before_it_is_read(world, tmp_path, late, monkeypatch):
    """When step k is begun, the rows up to k - 2 are there; when a checkpoint is written, all of them."""
    seen = {}
    begin, save = Trainer._factor, Trainer._save
    monkeypatch.setattr(
        Trainer,
        "_factor",
        lambda self, step: seen.setdefault(step, len(exact(tmp_path))) * 0 + begin(self, step),
    )
    saved = []
    monkeypatch.setattr(Trainer, "_save", lambda self: saved.append(len(exact(tmp_path))) or save(self))
    trainer(tmp_path, world).run()
    assert seen == {0: 0, 1: 0, 2: 1, 3: 3, 4: 3}
    assert saved == [3, 5]


def test_a_stop_writes_the_row_that_is_owed(world, tmp_path, late):
    asked = iter([False] * 4 + [True] * 99)
    with pytest.raises(Stopped):
        trainer(tmp_path, world, is_stopping=lambda: next(asked)).run()
    steps = [row["step"] for row in exact(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert RunPaths(tmp_path).checkpoint(steps[-1]).exists()


def test_poison_is_said_before_anything_after_it_is_kept(world, tmp_path, late, monkeypatch):
    """Step 2 is poison: known while step 3 is computed, and no checkpoint of it is made."""
    read = Outcome.read

    def poisoned(self):
        if self._step == 1:
            raise PoisonBatch("batch 1")
        return read(self)

    monkeypatch.setattr(Outcome, "read", poisoned)
    with pytest.raises(PoisonBatch):
        trainer(tmp_path, world).run()
    assert [row["step"] for row in exact(tmp_path)] == [1]
    assert list(RunPaths(tmp_path).checkpoints.iterdir()) == []
