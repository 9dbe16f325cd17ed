"""`plan` is pure: each case is a listing, a request, and the plan worked out by hand."""

import pytest

from ratchet.errors import Refusal
from ratchet.resume import Listing, Request, plan, plan_trainer


def same(kind="rl", **more):
    return Request(kind=kind, max_steps=20, has_run=True, is_same=True, **more)


def other(kind="rl", **more):
    return Request(kind=kind, max_steps=20, has_run=True, **more)


def test_an_empty_directory_is_a_fresh_run():
    chosen = plan(Listing(), Request(kind="rl", max_steps=20))
    assert (chosen.step, chosen.next_batch, chosen.from_checkpoint, chosen.complete) == (0, 0, False, False)


def test_resuming_the_newest_of_nothing_is_a_fresh_run_and_says_so():
    chosen = plan(Listing(), Request(kind="rl", max_steps=20, resume_step=-1))
    assert chosen.step == 0
    assert "fresh run" in chosen.messages[0]


def test_a_step_of_an_empty_directory_is_refused():
    with pytest.raises(Refusal, match="no checkpoint of step 5"):
        plan(Listing(), Request(kind="rl", max_steps=20, resume_step=5))


def test_the_same_command_continues_at_the_newest_checkpoint_and_replays_the_log():
    chosen = plan(Listing(checkpoints=(4, 8), batches=tuple(range(11))), same())
    assert (chosen.step, chosen.from_checkpoint, chosen.next_batch) == (8, True, 11)
    assert chosen.supersede == ()
    assert "step 8" in chosen.messages[0]
    assert "batches 8 to 10" in chosen.messages[0]


def test_the_same_command_with_an_older_resume_step_does_not_roll_back_twice():
    chosen = plan(Listing(checkpoints=(10, 14), batches=tuple(range(16))), same(resume_step=10))
    assert (chosen.step, chosen.rollback) == (14, False)


def test_the_same_command_after_success_is_complete():
    assert plan(Listing(checkpoints=(20,)), same(was_finished=True)).complete


def test_another_fresh_command_is_refused_with_the_remedies():
    with pytest.raises(Refusal, match=r"--ckpt.resume-step -1.*--output-dir"):
        plan(Listing(checkpoints=(10,)), other())


def test_resuming_the_newest_explicitly_keeps_the_log():
    chosen = plan(Listing(checkpoints=(10,), batches=tuple(range(12))), other(resume_step=10))
    assert (chosen.step, chosen.next_batch, chosen.rollback) == (10, 12, False)


def test_a_rollback_moves_everything_past_the_step_aside():
    listing = Listing(checkpoints=(4, 8), batches=tuple(range(10)), weights=(0, 4, 8, 9), evals=(0, 4, 8))
    chosen = plan(listing, other(resume_step=4))
    assert (chosen.step, chosen.next_batch, chosen.rollback) == (4, 4, True)
    assert set(chosen.supersede) == {
        *(f"batches/step_{k}" for k in range(4, 10)),
        "checkpoints/step_8",
        "weights/step_8",
        "weights/step_9",
        "evals/step_8",
    }


def test_a_step_without_a_checkpoint_lists_those_there_are():
    with pytest.raises(Refusal, match="no checkpoint of step 6; there are: 4, 8"):
        plan(Listing(checkpoints=(4, 8)), other(resume_step=6))


def test_max_steps_below_the_resumed_step_is_refused():
    with pytest.raises(Refusal, match="max_steps is 20, but the run stands at step 30"):
        plan(Listing(checkpoints=(30,)), other(resume_step=-1))


def test_resume_at_max_steps_of_a_finished_run_is_complete():
    assert plan(Listing(checkpoints=(20,)), other(resume_step=-1, was_finished=True)).complete
    assert plan(Listing(checkpoints=(20,)), other(resume_step=20, was_finished=True)).complete


def test_a_hole_in_the_log_ends_the_prefix_and_the_rest_is_moved_aside():
    chosen = plan(Listing(checkpoints=(4,), batches=(4, 5, 7, 8)), same())
    assert chosen.next_batch == 6
    assert set(chosen.supersede) == {"batches/step_7", "batches/step_8"}
    assert "Batch 6 is missing" in chosen.messages[1]


def test_a_damaged_batch_ends_the_prefix():
    listing = Listing(checkpoints=(4,), batches=(4, 6), damaged_batches={5: "batches/step_5 is damaged."})
    chosen = plan(listing, same())
    assert chosen.next_batch == 5
    assert set(chosen.supersede) == {"batches/step_5", "batches/step_6"}
    assert "step_5 is damaged" in chosen.messages[1]


SEGMENTS = ("001.orchestrator.1-1.log", "001.orchestrator.1-2.log")


def test_the_journal_stays_where_a_run_continues():
    assert plan(Listing(checkpoints=(4,), batches=(4, 5), journal=SEGMENTS), same()).supersede == ()


@pytest.mark.parametrize(
    ("listing", "request_"),
    [
        (Listing(checkpoints=(4, 8), batches=(4, 5, 6, 7), journal=SEGMENTS), other(resume_step=4)),
        (Listing(batches=(3, 4), weights=(4, 5), journal=SEGMENTS), same()),
        (Listing(checkpoints=(4,), batches=(4, 6), journal=SEGMENTS), same()),
    ],
    ids=["rollback", "starting again", "the log is cut"],
)
def test_the_journal_is_moved_aside_with_the_future_that_it_belongs_to(listing, request_):
    assert {f"journal/{name}" for name in SEGMENTS} <= set(plan(listing, request_).supersede)


def test_a_damaged_segment_stops_or_is_moved_aside_alone():
    damage = {SEGMENTS[0]: "journal/x is damaged at byte 18: expected 1, found 2."}
    listing = Listing(checkpoints=(4,), batches=(4, 5), journal=SEGMENTS, damaged_journal=damage)
    with pytest.raises(Refusal, match=r"at byte 18.*--ckpt.on-corrupt fallback.*sampled again"):
        plan(listing, same())
    chosen = plan(listing, same(on_corrupt="fallback"))
    assert (chosen.supersede, chosen.next_batch) == ((f"journal/{SEGMENTS[0]}",), 6)
    assert "at byte 18" in chosen.messages[1]


def test_a_damaged_newest_checkpoint_stops_and_names_the_newest_sound_one():
    listing = Listing(
        checkpoints=(4,), batches=tuple(range(9)), damaged_checkpoints={8: "step_8/x is damaged."}
    )
    with pytest.raises(Refusal, match=r"step_8/x is damaged.*--ckpt.on-corrupt fallback.*step 4"):
        plan(listing, same())


def test_fallback_moves_the_damaged_checkpoint_alone_aside_and_replays():
    listing = Listing(
        checkpoints=(4,), batches=tuple(range(9)), damaged_checkpoints={8: "step_8/x is damaged."}
    )
    chosen = plan(listing, same(on_corrupt="fallback"))
    assert (chosen.step, chosen.next_batch) == (4, 9)
    assert chosen.supersede == ("checkpoints/step_8",)


def test_without_a_checkpoint_the_whole_log_is_replayed_from_the_initial_weights():
    chosen = plan(Listing(batches=(0, 1, 2), weights=(0, 1)), same())
    assert (chosen.step, chosen.from_checkpoint, chosen.next_batch) == (0, False, 3)
    assert "initial weights" in chosen.messages[0]


def test_without_a_checkpoint_and_without_the_first_batches_it_starts_again_aloud():
    chosen = plan(Listing(batches=(3,), weights=(2, 3), evals=(0,)), same())
    assert (chosen.step, chosen.next_batch, chosen.rollback) == (0, 0, True)
    assert set(chosen.supersede) == {"batches/step_3", "weights/step_2", "weights/step_3"}
    assert "starting again at step 0" in chosen.messages[0]


def test_sft_has_no_log():
    chosen = plan(Listing(checkpoints=(20,)), Request(kind="sft", max_steps=40, has_run=True, resume_step=20))
    assert (chosen.step, chosen.next_batch, chosen.from_checkpoint) == (20, 20, True)


def test_a_trainer_alone_continues_at_the_newest_checkpoint_and_moves_nothing():
    chosen = plan_trainer(Listing(checkpoints=(3, 6), batches=tuple(range(9)), weights=(6, 7, 8)), "rl")
    assert (chosen.step, chosen.from_checkpoint, chosen.next_batch) == (6, True, 9)
    assert chosen.supersede == ()


def test_a_trainer_alone_starts_at_step_0_while_every_batch_is_there():
    chosen = plan_trainer(Listing(batches=(0, 1, 2), weights=(0, 1, 2)), "rl")
    assert (chosen.step, chosen.from_checkpoint, chosen.next_batch) == (0, False, 3)
    assert plan_trainer(Listing(), "rl").step == 0
    assert plan_trainer(Listing(checkpoints=(4,)), "sft").step == 4


@pytest.mark.parametrize(
    ("listing", "says"),
    [
        (Listing(batches=(3, 4), weights=(3, 4)), "first batches are gone"),
        (Listing(weights=(3,)), "first batches are gone"),
        (Listing(checkpoints=(3,), batches=(3, 5)), "Batch 4 is missing"),
        (Listing(checkpoints=(3,), batches=(3,), damaged_batches={4: "four is bad"}), "four is bad"),
        (Listing(checkpoints=(3,), damaged_checkpoints={6: "six is bad"}), "six is bad"),
    ],
)
def test_a_trainer_alone_does_not_continue_where_something_must_be_moved_aside(listing, says):
    with pytest.raises(Refusal, match=says):
        plan_trainer(listing, "rl")


@pytest.mark.parametrize("damaged", [{}, {12: "batches/step_12 is damaged"}])
def test_where_the_log_is_cut_the_policies_and_evaluations_behind_it_do_not_count(damaged):
    batches = tuple(k for k in range(15) if k != 12)
    listing = Listing(
        checkpoints=(12,),
        batches=batches,
        damaged_batches=damaged,
        weights=(11, 12, 13, 14, 15),
        evals=(10, 12, 15),
    )
    chosen = plan(listing, same())
    assert (chosen.step, chosen.next_batch, chosen.cuts_log) == (12, 12, True)
    moved = {name for name in chosen.supersede if not name.startswith("batches")}
    assert moved == {"weights/step_13", "weights/step_14", "weights/step_15", "evals/step_15"}


def test_a_whole_log_is_not_cut():
    assert not plan(Listing(checkpoints=(4,), batches=(4, 5), weights=(4, 5, 6)), same()).cuts_log


def test_asking_to_continue_what_cannot_be_continued_is_refused_and_starting_over_is_said():
    finished = Listing(batches=(19,), weights=(18, 19, 20))
    with pytest.raises(Refusal, match=r"model.name = its weights/step_N"):
        plan(finished, other(resume_step=-1))
    chosen = plan(finished, other(resume_step=0))
    assert (chosen.step, chosen.rollback) == (0, True)


DIFFERENT = ("data.batch_size: 16 -> 8", "max_steps: 40 -> 20")


def test_another_command_is_refused_by_what_differs_and_never_told_to_go_on_from_nothing():
    with pytest.raises(
        Refusal, match=r"data.batch_size: 16 -> 8; max_steps: 40 -> 20\): put them back, or"
    ) as caught:
        plan(Listing(weights=(40,)), other("sft", differences=DIFFERENT))
    assert "resume-step" not in str(caught.value)
    with pytest.raises(Refusal, match=r"put them back, go on with these .* by --ckpt\.resume-step -1, or"):
        plan(Listing(checkpoints=(4,)), other("sft", differences=DIFFERENT))
    with pytest.raises(Refusal, match=r"go on with these"):
        plan(Listing(batches=(0, 1)), other("rl", differences=DIFFERENT))


def test_a_training_that_saved_nothing_is_not_silently_done_again():
    """Its policy is there: the way on is named, and starting over moves it aside."""
    with pytest.raises(
        Refusal, match=r"begin a new run from the last policy \(model\.name = its weights/step_40"
    ):
        plan(Listing(weights=(40,)), other("sft", resume_step=-1, was_finished=True))
    chosen = plan(Listing(weights=(40,)), other("sft", resume_step=0))
    assert (chosen.step, chosen.rollback, chosen.supersede) == (0, True, ("weights/step_40",))
    assert "weights/step_40 and the rows of the training before are moved" in chosen.messages[0]
    again = plan(Listing(weights=(40,)), same("sft"))
    assert (again.step, again.rollback, again.supersede) == (0, False, ())
