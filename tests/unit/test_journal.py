"""The journal: what was finished is found again, what is damaged is named, what is settled goes."""

import time
from collections.abc import Container

import msgspec
import pytest

from ratchet import journal
from ratchet.errors import Damaged, Fenced
from ratchet.journal import MAGIC, Entry, Journal, RolloutId
from ratchet.paths import RunPaths
from ratchet.records import RolloutFailure, Sample, VersionSpan
from ratchet.stage import Stage

EVERY = range(1 << 40)


@pytest.fixture
def paths(tmp_path):
    paths = RunPaths(tmp_path)
    paths.staging.mkdir()
    paths.journal.mkdir()
    return paths


def stage(paths, incarnation=1, attempt=1):
    return Stage.open(paths, f"{attempt:03d}.orchestrator.{incarnation}")


def sample(draw, rollout=0, tokens=2):
    return Sample(
        env="sums",
        task=f"task {draw}",
        draw=draw,
        rollout=rollout,
        token_ids=list(range(tokens)),
        mask=[False] + [True] * (tokens - 1),
        logprobs=[0.0] + [-0.1 * i for i in range(1, tokens)],
        versions=[VersionSpan(3, 1, tokens)],
        reward=1 / 3,
        advantage=0.0,
        finish_reason="stop",
        metrics={"exact": 0.1},
    )


def entry(draw, rollout=0, key="k", tokens=2):
    return Entry(
        env="sums",
        draw=draw,
        rollout=rollout,
        key=key,
        policy="r/0/3/d",
        sample=sample(draw, rollout, tokens),
    )


def written(paths, *draws, segment_bytes=journal.SEGMENT_BYTES, incarnation=1):
    """The journal of a process that finished one rollout of each draw and died."""
    own = Journal(stage(paths, incarnation), segment_bytes=segment_bytes)
    for draw in draws:
        own.append(entry(draw))
        own.write()
    return own


def restored(paths, unsettled: Container[int] = EVERY, incarnation=9):
    own = Journal(stage(paths, incarnation))
    own.restore(unsettled)
    return own


def names(paths):
    return [path.name for path in journal.segments(paths)]


def test_what_was_written_is_found_once_and_to_the_last_bit(paths):
    own = Journal(stage(paths))
    failed = msgspec.structs.replace(entry(1), sample=None, failure=RolloutFailure("env_error", "boom"))
    for one in (entry(0), failed):
        own.append(one)
    assert names(paths) == []
    own.write()
    again = restored(paths)
    found = again.find(RolloutId("sums", 0, 0))
    assert found == entry(0)
    assert found is not None
    assert found.outcome == sample(0)
    assert again.find(RolloutId("sums", 0, 0)) is None
    assert again.find(RolloutId("sums", 0, 1)) is None
    other = again.find(RolloutId("sums", 1, 0))
    assert other is not None
    assert other.outcome == RolloutFailure("env_error", "boom")


def test_entries_of_settled_draws_are_ignored(paths):
    written(paths, 4, 5)
    own = restored(paths, unsettled={5})
    assert own.find(RolloutId("sums", 4, 0)) is None
    assert own.find(RolloutId("sums", 5, 0)) == entry(5)


def test_the_newest_entry_of_a_rollout_is_the_one(paths):
    for incarnation, key in ((2, "older"), (10, "newer")):
        own = Journal(stage(paths, incarnation))
        own.append(entry(0, key=key))
        own.write()
    found = restored(paths, incarnation=11).find(RolloutId("sums", 0, 0))
    assert found is not None
    assert found.key == "newer"


def test_every_cut_of_the_newest_segment_is_a_torn_tail(paths):
    written(paths, 0, 1)
    (path,) = journal.segments(paths)
    whole = path.read_bytes()
    first = len(MAGIC) + len(journal.frame(msgspec.msgpack.encode(entry(0))))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert journal.read(path, is_newest=True) == ([entry(0)] if length >= first else []), length
        # What the file system allocated and never filled, after a power cut.
        path.write_bytes(whole[:length] + bytes(4000))
        assert journal.read(path, is_newest=True) == ([entry(0)] if length >= first else []), length


@pytest.mark.parametrize("is_newest", [True, False])
def test_every_flipped_byte_is_found_and_named(paths, is_newest):
    written(paths, 0, 1, segment_bytes=1)
    path = journal.segments(paths)[0]  # entry and end
    whole = path.read_bytes()
    assert journal.read(path, is_newest=False) == [entry(0)]
    for offset in range(len(whole)):
        for bits in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[offset] ^= bits
            path.write_bytes(damaged)
            with pytest.raises(Damaged, match=r"-1\.log is damaged at byte \d+"):
                journal.read(path, is_newest=is_newest)


def test_a_length_that_points_past_the_end_is_damage_and_not_a_torn_tail(paths):
    written(paths, 0)
    (path,) = journal.segments(paths)
    data = bytearray(path.read_bytes())
    data[len(MAGIC) + 2] = 0xFF
    path.write_bytes(data)
    with pytest.raises(Damaged, match=f"damaged at byte {len(MAGIC)}: the length"):
        journal.read(path, is_newest=True)


def test_an_older_segment_that_was_cut_is_damage(paths):
    written(paths, 0, 1, segment_bytes=1)
    older, newest = journal.segments(paths)
    for length in range(older.stat().st_size):
        whole = older.read_bytes()
        older.write_bytes(whole[:length])
        assert list(journal.damaged(paths)) == [older.name]
        with pytest.raises(Damaged):
            Journal(Stage(paths, "unused")).restore(EVERY)
        older.write_bytes(whole)
    newest.write_bytes(newest.read_bytes()[:-1])
    assert journal.damaged(paths) == {}


def test_each_process_may_leave_one_torn_tail(paths):
    for incarnation in (1, 2):
        written(paths, incarnation, 5 + incarnation, incarnation=incarnation)
    for path in journal.segments(paths):
        path.write_bytes(path.read_bytes()[:-1])
    own = restored(paths)
    assert [own.find(RolloutId("sums", draw, 0)) for draw in (1, 2, 6, 7)] == [entry(1), entry(2), None, None]


def test_a_segment_goes_as_a_whole_once_every_draw_in_it_is_settled(paths):
    own = Journal(stage(paths), segment_bytes=2 * len(journal.frame(msgspec.msgpack.encode(entry(0)))))
    for draw in range(6):
        own.append(entry(draw))
        own.write()
    assert names(paths) == [f"001.orchestrator.1-{n}.log" for n in (1, 2, 3)]
    own.trim(own.release({1, *range(4, 99)}))
    assert names(paths) == [f"001.orchestrator.1-{n}.log" for n in (1, 3)]
    # A process that comes later trims what an older one left; the live one is begun anew.
    own.trim(own.release(()))
    assert names(paths) == []
    own.append(entry(6))
    own.write()
    own.sync()
    assert names(paths) == ["001.orchestrator.1-4.log"]
    later = restored(paths, unsettled={6})
    later.trim(later.release(range(7, 99)))
    assert names(paths) == []
    own.sync()


def test_a_replaced_process_can_neither_append_nor_trim(paths):
    first = stage(paths)
    own = Journal(first)
    own.append(entry(0))
    own.write()
    before = journal.segments(paths)[0].read_bytes()
    stage(paths, 2).revoke()
    own.append(entry(1))
    with pytest.raises(Fenced):
        own.write()
    with pytest.raises(Fenced):
        Journal(first).trim(journal.segments(paths))
    fresh = Journal(first)
    fresh.append(entry(2))
    with pytest.raises(Fenced):
        fresh.write()
    (path,) = journal.segments(paths)
    assert path.read_bytes() == before


def test_a_segment_that_was_moved_away_is_not_begun_again(paths):
    own = written(paths, 0)
    (path,) = journal.segments(paths)
    path.rename(paths.root / "aside")
    own.append(entry(1))
    with pytest.raises(FileNotFoundError):
        own.write()
    assert names(paths) == []


def test_a_step_of_rollouts_costs_less_than_a_tenth_of_a_second(paths):
    own = Journal(stage(paths))
    one = entry(0, tokens=2000)
    started = time.process_time()
    for _ in range(256):
        own.append(one)
        own.write()
    spent_s = time.process_time() - started
    size = sum(path.stat().st_size for path in journal.segments(paths))
    assert size > 256 * 20_000
    assert spent_s < 0.1
