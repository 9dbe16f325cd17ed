"""The losses, against numbers worked by hand."""

import math

import pytest
import torch

from ratchet.config import LossConfig
from ratchet.trainer.loss import cross_entropy, policy_gradient

LN2 = math.log(2)


def pg(ratio, advantage, **settings):
    """Loss and gradient with respect to the new logprob, for one token sampled with logprob -1."""
    logprob = torch.tensor([-1 + math.log(ratio)], requires_grad=True)
    result = policy_gradient(logprob, torch.tensor([-1.0]), torch.tensor([advantage]), LossConfig(**settings))
    result.loss.backward()
    return result, logprob.grad.item()


def test_cross_entropy_is_the_sum_of_negative_logprobs():
    assert cross_entropy(torch.tensor([-0.5, -1.5])).loss.item() == 2.0


def test_on_policy_gradient_is_minus_the_advantage():
    result, grad = pg(1.0, 0.25)
    assert result.loss.item() == -0.25
    assert grad == -0.25


def test_inside_the_clip_range_the_ratio_scales_loss_and_gradient():
    result, grad = pg(1.2, 1.0)
    assert result.loss.item() == pytest.approx(-1.2)
    assert grad == pytest.approx(-1.2)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        (1.5, 1.0, -1.28, 0.0),  # already more likely than the upper clip: no more push
        (0.5, -1.0, 0.8, 0.0),  # already less likely than the lower clip
        (0.5, 1.0, -0.5, -0.5),  # a good token that became unlikely is pulled back at full weight
        (1.5, -1.0, 1.5, 1.5),  # a bad token that became likely is pushed down at full weight
    ],
)
def test_clipping_is_pessimistic(ratio, advantage, loss, grad):
    result, found = pg(ratio, advantage)
    assert result.loss.item() == pytest.approx(loss)
    assert found == pytest.approx(grad)
    assert result.metrics["policy/clipped_fraction"].item() == (1.0 if grad == 0.0 else 0.0)


@pytest.mark.parametrize("ratio", [0.1, 9.0])
def test_an_extreme_ratio_is_left_out_and_counted(ratio):
    result, grad = pg(ratio, -1.0)
    assert result.loss.item() == 0.0
    assert grad == 0.0
    assert result.metrics["policy/masked_fraction"].item() == 1.0


def test_mismatch_kl_is_the_k3_estimate():
    result, _ = pg(2.0, 1.0)
    assert result.metrics["policy/mismatch_kl"].item() == pytest.approx(2 - 1 - LN2, rel=1e-5)


def test_a_group_of_equal_rewards_teaches_nothing():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    policy_gradient(logprobs, torch.tensor([-1.1, -2.2]), torch.zeros(2), LossConfig()).loss.backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("filler", [(-30.0, 0.0, 0.0), (0.0, -30.0, 5.0), (-1.0, -1.0, 1.0)])
def test_what_only_fills_up_counts_nowhere(filler):
    """Filler whose ratio would be masked, clipped, or one."""
    given = torch.tensor([[-1.2, -1.0, 0.5], [-0.5, -1.5, -1.0], [-2.0, -0.1, 1.0], [-6.0, -1.0, 1.0]])
    filled = torch.cat([given, torch.tensor([filler]).repeat(3, 1)])
    counts = torch.arange(len(filled)) < len(given)
    found = []
    for rows, which in ((given, None), (filled, counts)):
        for loss in (
            lambda *columns: cross_entropy(columns[0], columns[3]),
            lambda *columns: policy_gradient(*columns[:3], LossConfig(), columns[3]),
        ):
            logprobs = rows[:, 0].clone().requires_grad_()
            result = loss(logprobs, rows[:, 1], rows[:, 2], which)
            result.loss.backward()
            assert logprobs.grad is not None
            assert (logprobs.grad[len(given) :] == 0).all()
            figures = {name: value.item() for name, value in result.metrics.items()}
            found.append((result.loss.item(), logprobs.grad[: len(given)].tolist(), figures))
    for plain, other in ((found[0], found[2]), (found[1], found[3])):
        assert other[0] == pytest.approx(plain[0])
        assert other[1] == pytest.approx(plain[1])
        assert other[2] == pytest.approx(plain[2])
