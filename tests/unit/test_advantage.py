"""Advantages, worked by hand."""

import numpy as np
import pytest

from ratchet.orchestrator.advantage import group_advantages


def test_an_advantage_is_the_reward_minus_the_mean_of_its_own_group():
    rewards_PG = np.array([[1.0, 0.0, 0.0, 1.0], [0.9, 0.3, 0.0, 0.0]])
    found = group_advantages(rewards_PG, divide_by_std=False)
    np.testing.assert_allclose(found, [[0.5, -0.5, -0.5, 0.5], [0.6, 0.0, -0.3, -0.3]], atol=1e-12)


def test_dividing_by_the_standard_deviation_of_the_group():
    # Mean 2, deviations -2 0 0 2: population variance 8 / 4 = 2.
    found = group_advantages(np.array([[0.0, 2.0, 2.0, 4.0]]), divide_by_std=True)
    np.testing.assert_allclose(found, [[-(2**0.5), 0.0, 0.0, 2**0.5]], atol=1e-5)


@pytest.mark.parametrize("divide_by_std", [False, True])
def test_a_group_of_equal_rewards_teaches_nothing(divide_by_std):
    found = group_advantages(np.full((1, 3), 0.7), divide_by_std=divide_by_std)
    np.testing.assert_allclose(found, 0.0, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (3,), (2, 0)])
def test_rewards_without_siblings_are_an_error(shape):
    with pytest.raises(ValueError, match="two rollouts"):
        group_advantages(np.zeros(shape), divide_by_std=False)
