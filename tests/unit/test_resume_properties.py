"""What holds of every plan, whatever a directory lists and whatever is asked of it."""

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ratchet.attempts import Plan
from ratchet.errors import Refusal
from ratchet.paths import parse_step
from ratchet.resume import Listing, Request, plan, plan_trainer

MOST = 7
SEGMENTS = ("001.launcher.0-1.log", "001.launcher.0-2.log", "002.launcher.0-1.log")
some = st.integers(0, 2 ** (MOST + 1) - 1).map(lambda bits: {s for s in range(MOST + 1) if bits >> s & 1})
one = st.integers(0, MOST).map(lambda step: {step})
few = st.one_of(st.just(set()), one, some)
# Mostly what a run leaves, a stretch of steps, with some that are missing.
stretches = st.builds(
    lambda first, last, gone: set(range(first, last + 1)) - gone,
    st.integers(0, 3),
    st.integers(0, MOST),
    few,
)


def listed(found):
    return tuple(sorted(found))


def damages(names, bad):
    return {name: f"{name} is damaged." for name in sorted(names & bad)}


@st.composite
def listings(draw, kind):
    checkpoints, bad_checkpoints = draw(some) - {0}, draw(few)
    batches, bad_batches = (draw(stretches), draw(few)) if kind == "rl" else (set(), set())
    segments, bad_segments = ({SEGMENTS[n] for n in draw(few) if n < len(SEGMENTS)} for _ in range(2))
    journal = segments if kind == "rl" else set()
    return Listing(
        checkpoints=listed(checkpoints - bad_checkpoints),
        batches=listed(batches - bad_batches),
        weights=listed(draw(stretches)),
        evals=listed(draw(some)) if kind == "rl" else (),
        damaged_checkpoints=damages(checkpoints, bad_checkpoints),
        damaged_batches=damages(batches, bad_batches),
        journal=listed(journal),
        damaged_journal=damages(journal, bad_segments),
    )


@st.composite
def cases(draw):
    """A listing and a request of the same kind of run. Where no run was begun, nothing is listed."""
    kind = draw(st.sampled_from(["rl", "rl", "sft"]))
    has_run = draw(st.integers(0, 9)) > 0
    request = Request(
        kind=kind,
        max_steps=draw(st.one_of(st.just(MOST), st.integers(0, MOST))),
        resume_step=draw(st.one_of(st.none(), st.just(-1), st.integers(-1, MOST))),
        has_run=has_run,
        is_same=has_run and draw(st.booleans()),
        was_finished=has_run and draw(st.integers(0, 4)) == 4,
        on_corrupt=draw(st.sampled_from(["stop", "fallback", "fallback", "fallback"])),
    )
    return (draw(listings(kind)) if has_run else Listing()), request


def planned(listing, request) -> Plan | None:
    """The plan, or None for a refusal; there is no third. A plan that finds the run complete does nothing."""
    try:
        found = plan(listing, request)
    except Refusal as refusal:
        sentence = str(refusal)
    else:
        assert isinstance(found, Plan)
        return found
    assert sentence.endswith(".")
    return None


def decided(listing, request) -> Plan:
    """The plan of a case in which there is something to do."""
    found = planned(listing, request)
    assume(found is not None and not found.complete)
    assert found is not None
    return found


def names(listing):
    """Everything that a listing lists, as `supersede` names it."""
    return {
        *(f"checkpoints/step_{s}" for s in {*listing.checkpoints, *listing.damaged_checkpoints}),
        *(f"batches/step_{s}" for s in {*listing.batches, *listing.damaged_batches}),
        *(f"weights/step_{s}" for s in listing.weights),
        *(f"evals/step_{s}" for s in listing.evals),
        *(f"journal/{name}" for name in listing.journal),
    }


def left(listing, found):
    """The listing after the plan was applied."""
    gone = set(found.supersede)

    def rest(kind, values):
        return tuple(s for s in values if f"{kind}/step_{s}" not in gone)

    def unhurt(kind, damaged):
        return {s: why for s, why in damaged.items() if f"{kind}/step_{s}" not in gone}

    return Listing(
        checkpoints=rest("checkpoints", listing.checkpoints),
        batches=rest("batches", listing.batches),
        weights=rest("weights", listing.weights),
        evals=rest("evals", listing.evals),
        damaged_checkpoints=unhurt("checkpoints", listing.damaged_checkpoints),
        damaged_batches=unhurt("batches", listing.damaged_batches),
        journal=tuple(name for name in listing.journal if f"journal/{name}" not in gone),
        damaged_journal={n: why for n, why in listing.damaged_journal.items() if f"journal/{n}" not in gone},
    )


many = settings(max_examples=200, deadline=None)


@many
@given(cases())
def test_there_is_a_plan_or_a_refusal_and_nothing_else(case):
    listing, request = case
    found = planned(listing, request)
    if found is not None and not found.complete:
        assert 0 <= found.step <= max(request.max_steps, 0) or not request.has_run
        assert found.from_checkpoint == (found.step > 0)
        assert found.step == 0 or found.step in listing.checkpoints


@many
@given(cases())
def test_what_is_replayed_is_there_without_a_gap_and_to_its_end(case):
    listing, request = case
    found = decided(listing, request)
    assert set(range(found.step, found.next_batch)) <= set(listing.batches)
    if request.kind == "sft" or found.rollback:
        assert found.next_batch == found.step
    else:
        assert found.next_batch >= found.step
        assert found.next_batch not in listing.batches
    rest = left(listing, found)
    assert request.kind == "sft" or max([*rest.batches, *rest.damaged_batches], default=-1) < max(
        found.next_batch, 1
    )


@many
@given(cases())
def test_nothing_that_is_continued_from_is_moved_aside(case):
    listing, request = case
    found = decided(listing, request)
    assert len(set(found.supersede)) == len(found.supersede)
    assert set(found.supersede) <= names(listing)
    for name in found.supersede:
        root, _, last = name.partition("/")
        step = parse_step(last)
        if root == "journal":
            assert found.rollback or found.cuts_log or last in listing.damaged_journal
        elif root == "checkpoints":
            assert step in listing.damaged_checkpoints or (found.rollback and step > found.step)
        elif root == "batches":
            assert step >= found.next_batch
        else:
            assert (found.rollback and step > found.step) or (found.cuts_log and step > found.next_batch)


@many
@given(cases())
def test_planned_again_after_it_was_applied_nothing_more_is_rolled_back(case):
    listing, request = case
    found = decided(listing, request)
    rest = left(listing, found)
    again = plan(rest, msgspec.structs.replace(request, is_same=request.has_run, was_finished=False))
    assert (again.step, again.next_batch, again.from_checkpoint) == (
        found.step,
        found.next_batch,
        found.from_checkpoint,
    )
    assert not again.rollback
    assert not again.cuts_log
    assert not again.complete
    # Damaged checkpoints older than the step of a rollback may go now; else nothing is left to be moved.
    damaged = {f"checkpoints/step_{s}" for s in rest.damaged_checkpoints} if found.rollback else set()
    assert set(again.supersede) <= damaged


@many
@given(cases())
def test_a_rollback_leaves_nothing_beyond_its_step(case):
    listing, request = case
    found = decided(listing, request)
    rest = left(listing, found)
    if found.rollback:
        assert max([*rest.checkpoints, *rest.damaged_checkpoints], default=0) <= found.step
        assert max([*rest.batches, *rest.damaged_batches], default=-1) < found.step
        assert max([*rest.weights, *rest.evals], default=0) <= found.step
        assert rest.journal == ()
    if request.is_same or not found.rollback:
        # The same command never rolls back to a step that it was once given.
        assert found.step == max(listing.checkpoints, default=0)


@many
@given(st.sampled_from(["rl", "sft"]).flatmap(lambda kind: st.tuples(st.just(kind), listings(kind))))
def test_a_trainer_alone_continues_where_a_new_attempt_would_and_moves_nothing(case):
    kind, listing = case
    try:
        found = plan_trainer(listing, kind)
    except Refusal:
        return
    assert found.supersede == ()
    request = Request(kind=kind, max_steps=MOST, has_run=True, is_same=True, on_corrupt="fallback")
    whole = plan(listing, request)
    assert (found.step, found.next_batch) == (whole.step, whole.next_batch)
    assert not whole.rollback
    assert not whole.cuts_log
