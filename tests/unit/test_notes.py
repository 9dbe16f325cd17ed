"""What launchers of several nodes tell each other, and where the ranks of a node stand among all."""

import pytest

from ratchet.launch import notes
from ratchet.launch.program import Ranks, rank_environment


def test_the_place_of_a_node_is_taken_once_in_an_incarnation(tmp_path):
    assert notes.take(tmp_path, 1)
    assert notes.take(tmp_path, 10)
    assert not notes.take(tmp_path, 1)


def test_what_is_said_about_an_incarnation_that_has_ended_is_lost(tmp_path):
    gone = tmp_path / "gone"
    notes.report(gone, 1, -9)
    notes.ask_to_stop(gone, 1)
    assert (notes.failures(gone), notes.is_asked_to_stop(gone)) == ([], False)
    assert not gone.exists()
    with pytest.raises(FileNotFoundError):
        notes.take(gone, 1)


def test_failures_of_nodes_are_their_exit_codes(tmp_path):
    notes.report(tmp_path, 1, -9)
    notes.report(tmp_path, 2, 65)
    (tmp_path / "lost.3").touch()  # not written yet
    assert sorted(notes.failures(tmp_path)) == [-9, 65]
    assert not notes.is_asked_to_stop(tmp_path)
    notes.ask_to_stop(tmp_path, 2)
    assert notes.is_asked_to_stop(tmp_path)


def test_the_ranks_of_the_second_of_two_nodes_with_four_each(tmp_path):
    ranks = Ranks(here=4, node=1, nodes=2, rendezvous="10.0.0.1:29500")
    assert (list(ranks.own), ranks.total) == ([4, 5, 6, 7], 8)
    found = rank_environment(6, ranks, tmp_path / "002.trainer.3")
    assert found == {
        "RANK": "6",
        "LOCAL_RANK": "2",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "RATCHET_RENDEZVOUS": "tcp://10.0.0.1:29500/002.trainer.3",
    }


def test_a_single_rank_is_told_nothing(tmp_path):
    assert rank_environment(0, Ranks(), tmp_path) == {}
