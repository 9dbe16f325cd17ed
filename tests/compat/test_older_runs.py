"""Run directories of older versions, killed in the middle: the command that each was started by continues it."""

import json
import tarfile
from pathlib import Path

import pytest

from programs import run
from ratchet import audit, durable, metrics
from ratchet.paths import RunPaths

ARCHIVES = sorted(path.name for path in Path(__file__).parent.glob("*.tar.xz"))
LAST = {"sft": 6, "rl": 8}
COUNTS = ("samples", "tokens", "tokens/trained", "progress/total_samples", "progress/total_tokens")


class Older:
    """An older run, as it lay when it was killed."""

    def __init__(self, archive, root):
        with tarfile.open(Path(__file__).parent / archive) as held:
            held.extractall(root, filter="data")
        self.root = root
        self.paths = RunPaths(root / "run")
        record = json.loads((self.paths.attempt(1) / "record.json").read_text())
        self.kind, self.command = record["kind"], record["argv"]
        self.saved = max(durable.committed(self.paths.checkpoints))
        self.behind = [step for step in durable.committed(self.paths.batches) if step >= self.saved]

    def rows(self):
        return metrics.read(self.paths.metric("trainer"))

    def published(self):
        """Every published directory by name, as its manifest hashes it."""
        kinds = (self.paths.batches, self.paths.checkpoints, self.paths.evals, self.paths.weights)
        return {
            f"{root.name}/{step}": manifest.hash
            for root in kinds
            for step, manifest in durable.committed(root).items()
        }

    def goes_on(self):
        return run(*self.command, cwd=self.root)


def archives(*kinds):
    return [name for name in ARCHIVES if not kinds or name.split(".")[-3] in kinds]


def test_every_kind_of_run_is_here():
    assert {name.split(".")[-3] for name in ARCHIVES} == {"sft", "rl", "rl-deterministic"}


@pytest.mark.parametrize("archive", archives())
def test_the_same_command_continues_it_to_its_end(archive, tmp_path):
    """What was published, and trained before the checkpoint, stays; behind it the same data is trained again."""
    older = Older(archive, tmp_path)
    rows, published = older.rows(), older.published()
    assert 0 < older.saved < rows[-1]["step"]
    said = older.goes_on()
    assert f"at step {older.saved}" in said, said
    found = older.rows()
    assert [row["step"] for row in found] == list(range(1, LAST[older.kind] + 1))
    assert found[: older.saved] == rows[: older.saved]
    for before, again in zip(rows[older.saved :], found[older.saved :], strict=False):
        assert again["loss"] == pytest.approx(before["loss"], abs=1e-4)  # by another processor
        assert {key: again[key] for key in COUNTS} == {key: before[key] for key in COUNTS}
    now = older.published()
    assert [name for name, digest in published.items() if now.get(name, digest) != digest] == []
    assert {f"checkpoints/{older.saved}", *(f"batches/{step}" for step in older.behind)} <= now.keys()
    assert "0 damaged" in run("ckpt", "verify", older.paths.root)
    assert run("ckpt", "audit", older.paths.root).startswith("clean\n")


@pytest.mark.parametrize("archive", archives("rl", "rl-deterministic"))
def test_the_rollouts_that_were_finished_are_found_in_the_journal(archive, tmp_path):
    """Two batches are replayed; a rollout behind them is used, or played again where its environment is another one."""
    older = Older(archive, tmp_path)
    assert older.behind == [3, 4]
    older.goes_on()
    new = [row for row in metrics.read(older.paths.metric("orchestrator")) if row["step"] > 5]
    found = [row["fault/replayed_from_journal"] + row["fault/journal_mismatch"] for row in new]
    assert sum(found) > 0


@pytest.mark.parametrize("archive", archives("sft"))
def test_the_audit_of_an_older_sft_run_counts_its_rows(archive, tmp_path):
    """Its checkpoints need not say how many rows the data has; those of now do."""
    older = Older(archive, tmp_path)
    assert audit.audit(older.paths).findings == []
    older.goes_on()
    assert str(audit.audit(older.paths).rows) == "40 rows: each 1 or 2 times; 48 consumed, epoch 1.20"
