"""`plan` is pure: each case is a listing, a request, and the plan worked out by hand."""

import pytest

from ratchet.errors import Refusal
from ratchet.resume import Listing, Request, plan


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
