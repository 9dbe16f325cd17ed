"""From samples to micro-batches: nothing lost, nothing doubled, the budget kept, on any number of ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ratchet.trainer.packing import Example, micro_batches, split

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=50)


@given(lengths, st.integers(1, 200))
def test_split_keeps_every_row_once_within_the_budget(lengths, budget):
    groups = split(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget


def example(first, length):
    return Example(
        token_ids=list(range(first, first + length)),
        mask=[False] + [True] * (length - 1),
        logprobs=[-float(first + i) for i in range(length)],
        advantage=float(first),
    )


@given(lengths, st.integers(1, 200), st.integers(1, 4), st.booleans())
def test_the_ranks_share_every_trained_token_once(lengths, budget, ranks, few_shapes):
    examples = [example(100 * i, n + 1) for i, n in enumerate(lengths)]
    shares = [micro_batches(examples, budget, rank, ranks, few_shapes=few_shapes) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # collectives need the same number everywhere
    targets = np.concatenate([m.targets_BT[m.mask_BT] for share in shares for m in share])
    assert sorted(targets) == sorted(t for e in examples for t in e.token_ids[1:])


@given(lengths, st.sampled_from([64, 100, 256]))
def test_of_few_shapes_is_what_is_compiled(lengths, budget):
    """At most: 16, 32 and 64 wide, times 1, 2, 4, 8, 16 rows, or as many as the budget holds."""
    examples = [example(100 * i, n + 1) for i, n in enumerate(lengths)]
    for micro in micro_batches(examples, budget, 0, 1, few_shapes=True):
        height, width = micro.inputs_BT.shape
        assert width in (16, 32, 64)
        assert height in (1, 2, 4, 8, 16) or height == budget // width
        assert height == 1 or height * width <= budget


def test_targets_behaviour_and_advantage_belong_to_the_next_token():
    (micro,) = micro_batches([example(10, 3), example(20, 2)], budget=100, rank=0, ranks=1)
    assert micro.inputs_BT[micro.mask_BT].tolist() == [10, 11, 20]
    assert micro.targets_BT.tolist() == [[11, 12], [21, 0]]
    assert micro.mask_BT.tolist() == [[True, True], [True, False]]
    assert micro.behaviour_N.tolist() == [-11.0, -12.0, -21.0]
    assert micro.advantages_N.tolist() == [10.0, 10.0, 20.0]


def test_a_sample_without_trained_tokens_costs_no_forward_pass():
    silent = Example([1, 2, 3], [True, False, False])
    (micro,) = micro_batches([silent, example(10, 2)], budget=100, rank=0, ranks=1)
    assert micro.inputs_BT.tolist() == [[10]]
