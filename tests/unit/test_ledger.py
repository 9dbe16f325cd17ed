"""The chain of the ledger, and what a start makes of one that a crash cut short."""

import msgspec
import pytest
import xxhash

from ratchet import batchlog, ledger
from ratchet.ledger import Trained
from ratchet.paths import RunPaths
from ratchet.records import FileEntry, Manifest, Sample
from ratchet.stage import Stage


def sample(draw, rollout, tokens=2, logprob=-0.5):
    return Sample(
        env="letters",
        task=f"train/{draw * 10}",
        draw=draw,
        rollout=rollout,
        token_ids=[1] * tokens,
        mask=[True] * tokens,
        logprobs=[logprob] * tokens,
        versions=[],
        reward=1.0,
        advantage=0.0,
        finish_reason="stop",
    )


def state(step, **more):
    totals = {"step": step + 1, "total_samples": 3 * (step + 1)}
    return msgspec.json.encode({"progress": totals, "next_draw": 3 * (step + 1), **more})


def manifest(step):
    return Manifest(kind="batch", step=step, attempt=1, files=())


def publish(stage, step, logprob=-0.5):
    """Batch `step`: draws 3k and 3k+1 with 2 and 1 samples; draw 3k+2 was dropped."""
    first = 3 * step
    batchlog.publish(
        stage,
        step=step,
        attempt=1,
        samples=[sample(first, 0, logprob=logprob), sample(first, 1), sample(first + 1, 0, tokens=5)],
        state=state(step, drops_of_batch=[[first + 2, "failed"]]),
        metrics={"step": step + 1},
        oldest_served=0,
    )


def opened(root):
    paths = RunPaths(root)
    for directory in (paths.staging, paths.batches):
        directory.mkdir()
    return Stage.open(paths, "001.orchestrator.1")


@pytest.fixture
def stage(tmp_path):
    return opened(tmp_path)


@pytest.fixture
def written(stage):
    """A ledger of four batches that are there."""
    for step in range(4):
        publish(stage, step)
        ledger.append(stage, ledger.line_of(stage.paths, step))
    return stage.paths.ledger


def problems(path):
    return [problem for _, problem in ledger.checked(path) if problem]


def test_a_line_says_what_a_batch_did_with_its_draws(written):
    (_, second, *_), found = zip(*ledger.checked(written), strict=True)
    assert found == ("", "", "", "")
    assert second.trained == [
        Trained(3, "letters", "train/30", 2),
        Trained(4, "letters", "train/40", 1),
    ]
    assert second.dropped == [(5, "failed")]
    assert (second.step, second.next_draw, second.samples, second.tokens) == (1, 6, 3, 9)


def test_the_payload_is_made_as_documented(stage, written):
    """By hand, from the bytes of the two files, as docs/run-directory.md says."""
    for step, (entry, _) in enumerate(ledger.checked(written)):
        hashes = [
            xxhash.xxh3_128_hexdigest((stage.paths.batch(step) / name).read_bytes())
            for name in ("orchestrator.json", "samples.msgpack")
        ]
        said = f'[["orchestrator.json","{hashes[0]}"],["samples.msgpack","{hashes[1]}"]]'
        assert entry.payload == xxhash.xxh3_128_hexdigest(said.encode())


def test_a_payload_that_was_worked_out_once():
    """Of two files whose hashes are `aa` and `bb`: formats are an interface, so the number stays."""
    files = (FileEntry("metrics.json", 1, "cc"), FileEntry("samples.msgpack", 1, "bb"))
    manifest = Manifest(
        kind="batch", step=0, attempt=1, files=(*files, FileEntry("orchestrator.json", 1, "aa"))
    )
    assert batchlog.payload(manifest) == "fd2278d08c2e47828ef7a5faea980387"


def test_the_chain_tells_batches_apart_that_differ_in_one_logprob(written, tmp_path_factory):
    other = opened(tmp_path_factory.mktemp("other"))
    for step in range(4):
        publish(other, step, logprob=-0.5 if step else -0.25)
        ledger.append(other, ledger.line_of(other.paths, step))
        other.remove(other.paths.batch(step))
    mine, others = ledger.raw_lines(written), ledger.raw_lines(other.paths.ledger)
    assert all(a != b for a, b in zip(mine, others, strict=True))
    assert ledger.chain_end(written) != ledger.chain_end(other.paths.ledger)


def test_a_line_from_before_there_were_payloads_is_sound_and_still_of_its_batch(stage, written):
    older = []
    for entry, _ in ledger.checked(written):
        before = older[-1].hash if older else ""
        older.append(ledger.chained(msgspec.structs.replace(entry, payload=""), before))
    assert b"payload" not in ledger.encode(older[0])
    written.write_bytes(b"".join(map(ledger.encode, older[:3])))
    ledger.restore(stage, 4)
    found = [entry for entry, _ in ledger.checked(written)]
    assert not problems(written)
    assert [bool(entry.payload) for entry in found] == [False, False, False, True]
    assert all(ledger.agrees(entry, ledger.line_of(stage.paths, step)) for step, entry in enumerate(found))


def test_an_edited_line_breaks_the_chain(written):
    written.write_bytes(written.read_bytes().replace(b'"train/30"', b'"train/31"'))
    (only,) = problems(written)
    assert "line 2 (batch 1)" in only


def test_a_line_of_the_same_meaning_in_other_bytes_is_not_sound(written):
    written.write_bytes(written.read_bytes().replace(b'{"step":2', b'{"step": 2'))
    assert len(problems(written)) == 1


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_removed_line_breaks_the_chain(written, gone):
    lines = ledger.raw_lines(written)
    written.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
    (only,) = problems(written)
    assert f"batch {gone + 1}" in only


def test_two_lines_in_another_order_break_the_chain(written):
    a, b, *rest = ledger.raw_lines(written)
    written.write_bytes(b"".join([b, a, *rest]))
    assert problems(written)


def test_a_line_that_was_not_appended_before_a_crash_is_made_from_its_batch(stage, written):
    whole = written.read_bytes()
    lines = ledger.raw_lines(written)
    for torn in (b"".join(lines[:3]), whole[:-7], b"".join(lines[:1]), b""):
        written.write_bytes(torn)
        ledger.restore(stage, 4)
        assert written.read_bytes() == whole


def test_a_last_line_with_a_hole_in_it_is_made_again_if_its_batch_is_there(stage, written):
    whole, lines = written.read_bytes(), ledger.raw_lines(written)
    torn = b"".join(lines[:-1]) + lines[-1][:20] + bytes(9) + lines[-1][29:]
    written.write_bytes(torn)
    ledger.restore(stage, 4)
    assert written.read_bytes() == whole
    written.write_bytes(torn)
    stage.remove(stage.paths.batch(3))
    ledger.restore(stage, 4)
    assert written.read_bytes() == torn


def test_a_rollback_cuts_the_lines_and_keeps_them_aside(stage, written, tmp_path):
    lines = ledger.raw_lines(written)
    aside = stage.paths.superseded / "002"
    for _ in range(2):  # a start that died inside is done again
        ledger.restore(stage, 2, aside=aside)
        assert ledger.raw_lines(written) == lines[:2]
        assert ledger.raw_lines(aside / "ledger" / "ledger.jsonl") == lines[2:]
    ledger.append(stage, ledger.line_of(stage.paths, 2))
    assert ledger.raw_lines(written) == lines[:3]


def test_a_damaged_line_stays_for_the_audit_and_the_run_goes_on(stage, written):
    lines = ledger.raw_lines(written)
    written.write_bytes(b"".join([lines[0], b"{nonsense\n", *lines[2:3]]))
    ledger.restore(stage, 4)
    steps = [entry.step if entry else None for entry, _ in ledger.checked(written)]
    assert steps == [0, None, 2, 3]
    assert ["does not parse" in p for p in problems(written)] == [True, False]


def test_the_chain_goes_on_after_a_line_longer_than_one_read(stage, written):
    huge = ledger.line(manifest(4), [sample(draw, 0) for draw in range(100, 9000)], state(4))
    assert len(ledger.encode(huge)) > 4 * 2**16
    ledger.append(stage, huge)
    ledger.append(stage, ledger.line(manifest(5), [sample(9001, 0)], state(5)))
    assert not problems(written)


def test_the_lines_of_a_fork_keep_their_bytes(written):
    assert ledger.lines_below(written, 2) == b"".join(ledger.raw_lines(written)[:2])
