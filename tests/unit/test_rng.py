"""Derived randomness: the same place gives the same number, for ever."""

import numpy as np

from ratchet.rng import EpochOrder, derive, permutation


def test_derived_seeds_are_pinned():
    # A change here would silently change every run: these numbers are part of the format.
    assert derive(0, "a", 1) == 4403504271606596215
    assert permutation(7, 0, 6).tolist() == [1, 2, 0, 5, 4, 3]


def test_places_do_not_run_into_each_other():
    assert len({derive(0, "a", 12), derive(0, "a1", 2), derive(0, "a", "12"), derive(0, "a", 1, 2)}) == 4


def test_a_permutation_has_each_index_once_and_differs_by_epoch():
    first, second = permutation(1, 0, 1000), permutation(1, 1, 1000)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert not np.array_equal(first, second)


def test_epoch_order_is_a_function_of_the_draw_alone():
    order = EpochOrder(3, 10)
    forward = [order.row(draw) for draw in range(30)]
    assert [EpochOrder(3, 10).row(draw) for draw in reversed(range(30))] == forward[::-1]
    assert sorted(forward[:10]) == sorted(forward[10:20]) == list(range(10))
