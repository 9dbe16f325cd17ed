"""Demonstrations are trained in their order, each row once an epoch, whatever the batch size is from a resume on."""

import json
from itertools import chain

import msgspec
import pytest

from ratchet import audit_rows, metrics
from ratchet.attempts import Assignment, Plan
from ratchet.config import SFTConfig
from ratchet.paths import RunPaths
from ratchet.records import Progress
from ratchet.rng import derive, permutation
from ratchet.stage import Stage
from ratchet.trainer.loop import Trainer
from ratchet.trainer.update import Updater
from training import MODEL

ROWS = 100


@pytest.fixture
def trained(monkeypatch):
    """The batches of all trainers, as lists of token ids."""
    batches = []
    begin = Updater.begin

    def noted(self, batch, step, factor):
        batches.append([tuple(example.token_ids) for example in batch.examples])
        return begin(self, batch, step, factor)

    monkeypatch.setattr(Updater, "begin", noted)
    return batches


@pytest.fixture
def paths(tmp_path):
    return RunPaths(tmp_path / "run")


@pytest.fixture
def attempt(world, tmp_path, paths):
    """Start the trainer of an attempt as its program does, without a launcher."""
    data = tmp_path / "rows.jsonl"

    def write(long):
        """The prompts of so many of the rows are long."""
        prompts = [f"{i:03d}" + "a" * 20 * (i < long) for i in range(ROWS)]
        data.write_text("".join(json.dumps({"prompt": p, "completion": "x"}) + "\n" for p in prompts))

    for directory in (paths.staging, paths.checkpoints, paths.weights, paths.metrics, paths.timelines):
        directory.mkdir(parents=True)
    paths.metric("trainer").touch()

    def run(number, start, steps, long=0, **settings):
        write(long)
        config = SFTConfig.model_validate(
            {
                "model": MODEL,
                "max_steps": steps,
                "data": {"name": str(data), **settings},
                "ckpt": {},
                "trainer": {"precision": "fp32", "device": "cpu"},
            }
        )
        stage = Stage.open(paths, f"{number:03d}.trainer.1")
        plan = Plan(step=start, from_checkpoint=start > 0)
        assignment = Assignment(
            paths=paths, config=config, plan=plan, attempt=number, run_id="x", lineage=0, stage=stage
        )
        Trainer(assignment, world, lambda: False).run()

    return run


def test_another_batch_size_on_resume_neither_skips_nor_repeats_rows(attempt, trained, paths):
    """Three batches of 8 and three of 16 are the first 72 rows of the epoch."""
    attempt(1, 0, 3, batch_size=8)
    attempt(2, 3, 6, batch_size=16)
    attempt(3, 6, 7, batch_size=28)
    assert [len(batch) for batch in trained] == [8, 8, 8, 16, 16, 16, 28]
    epoch = list(chain(*trained))
    assert len(set(epoch[:72])) == 72
    assert len(set(epoch)) == ROWS
    report, problems, notes = audit_rows.reconcile(paths)
    assert (problems, notes) == ([], [])
    assert str(report) == "100 rows: each 1 times; 100 consumed, epoch 1.00"
    trained.clear()
    attempt(4, 0, 1, batch_size=ROWS)  # what nobody resumed
    assert trained == [epoch]


def test_skipped_rows_are_consumed_whatever_the_batch_size_is_from_a_resume_on(attempt, trained, paths):
    """The prompts of rows 0 to 4 have 23 tokens: cut to 9, no answer is left. An epoch trains the other 95."""
    allowed = {"max_length": 9, "max_skipped": 0.05}
    attempt(1, 0, 3, batch_size=8, long=5, **allowed)
    attempt(2, 3, 6, batch_size=16, long=5, **allowed)
    attempt(3, 6, 7, batch_size=28, long=5, **allowed)
    epoch = list(chain(*trained))
    assert len(epoch) == len(set(epoch)) == 95
    written = metrics.read(paths.metric("trainer"))
    assert [row["samples"] + row.get("data/skipped", 0) for row in written] == [8, 8, 8, 16, 16, 16, 28]
    report, problems, notes = audit_rows.reconcile(paths)
    assert (problems, notes) == ([], [])
    assert str(report) == "100 rows: each 1 times; 100 consumed, 5 of them skipped, epoch 1.00"
    trained.clear()
    attempt(4, 0, 1, batch_size=ROWS, long=5, **allowed)
    assert trained == [epoch]


def test_a_checkpoint_of_a_version_that_skipped_nothing_continues(attempt, trained, paths):
    attempt(1, 0, 2, batch_size=8)
    progress = paths.checkpoint(2) / audit_rows.PROGRESS
    stated = json.loads(progress.read_bytes())
    assert stated.pop("total_skipped") == 0
    assert msgspec.json.decode(json.dumps(stated), type=Progress) == Progress(
        step=2, total_samples=16, total_tokens=stated["total_tokens"]
    )


def test_the_order_is_that_of_the_seed_and_of_the_epoch(attempt, trained):
    """Two epochs less four rows, in batches that end nowhere near an epoch."""
    attempt(1, 0, 2, batch_size=70)
    attempt(2, 2, 3, batch_size=56)
    rows = sorted(set(chain(*trained)))
    orders = [permutation(derive(0, "data"), epoch, ROWS) for epoch in (0, 1)]
    assert list(chain(*trained)) == [rows[i] for order in orders for i in order][:196]
