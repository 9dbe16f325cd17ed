"""From samples to micro-batches: nothing lost, nothing doubled, the budget kept, on any number of ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ratchet.trainer.packing import Example, micro_batches, share_prompts, split

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
    targets = np.concatenate([m.targets_N for share in shares for m in share])
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
    assert micro.inputs_BT.tolist() == [[10, 11], [20, 0]]
    assert micro.cells_N.tolist() == [0, 1, 2]
    assert micro.targets_N.tolist() == [11, 12, 21]
    assert micro.behaviour_N.tolist() == [-11.0, -12.0, -21.0]
    assert micro.advantages_N.tolist() == [10.0, 10.0, 20.0]


def test_a_sample_without_trained_tokens_costs_no_forward_pass():
    silent = Example([1, 2, 3], [True, False, False])
    (micro,) = micro_batches([silent, example(10, 2)], budget=100, rank=0, ranks=1)
    assert micro.inputs_BT.tolist() == [[10]]


def rollout(prompt, completion, advantage=0.0):
    ids = [*prompt, *completion]
    mask = [False] * len(prompt) + [True] * len(completion)
    return Example(ids, mask, [-float(token) for token in ids], advantage)


def test_three_rollouts_of_one_prompt_are_one_row():
    rollouts = [rollout([1, 2, 3, 4], c, a) for c, a in (([5, 6, 7], 0.5), ([8], -1.0), ([9, 10], 2.0))]
    (micro,) = micro_batches(rollouts, 100, 0, 1, shares_prompts=True)
    assert micro.inputs_BT.tolist() == [[1, 2, 3, 4, 5, 6, 9]]
    assert micro.branches is not None
    assert micro.branches.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5, 4]]
    assert micro.branches.owners_BT.tolist() == [[0, 0, 0, 0, 1, 1, 3]]
    assert micro.cells_N.tolist() == [3, 4, 5, 3, 3, 6]  # the prompt's last cell has three next tokens
    assert micro.targets_N.tolist() == [5, 6, 7, 8, 9, 10]
    assert micro.behaviour_N.tolist() == [-5.0, -6.0, -7.0, -8.0, -9.0, -10.0]
    assert micro.advantages_N.tolist() == [0.5, 0.5, 0.5, -1.0, 2.0, 2.0]


def test_prompts_that_differ_are_rows_of_their_own():
    rollouts = [rollout([1, 2], [3, 4]), rollout([1, 9], [3, 4])]
    (micro,) = micro_batches(rollouts, 100, 0, 1, shares_prompts=True)
    assert micro.branches is None
    assert micro.inputs_BT.tolist() == [[1, 2, 3], [1, 9, 3]]


def test_what_an_environment_said_between_two_turns_belongs_to_its_rollout():
    turns = Example([1, 2, 3, 7, 8, 4], [False, False, True, False, False, True])
    (micro,) = micro_batches([turns, rollout([1, 2], [5])], 100, 0, 1, shares_prompts=True)
    assert micro.inputs_BT.tolist() == [[1, 2, 3, 7, 8]]
    assert (micro.cells_N.tolist(), micro.targets_N.tolist()) == ([1, 4, 1], [3, 4, 5])


prompts = st.lists(st.integers(1, 12), min_size=1, max_size=4)
completions = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=40)


@given(prompts, completions, st.integers(1, 200))
def test_shared_rows_hold_every_rollout_once_and_are_not_much_wider_than_their_prompt(prompts, drawn, budget):
    rollouts = [
        rollout(range(100 * (which % len(prompts)), 100 * (which % len(prompts)) + prompts[which % len(prompts)]),
                range(1000 * i + 1000, 1000 * i + 1000 + length))
        for i, (which, length) in enumerate(drawn)
    ]  # fmt: skip
    rows = share_prompts(rollouts, budget)
    assert sorted(id(e) for row in rows for e in row.examples) == sorted(id(e) for e in rollouts)
    for row in rows:
        assert len({e.prompt for e in row.examples}) == 1
        if len(row.examples) > 1:
            assert row.width <= min(budget, 6 * row.trunk)
            assert row.trunk == len(row.examples[0].prompt)
        else:
            assert row.width == len(row.examples[0].token_ids) - 1


def test_single_rows_do_not_stand_beside_shared_ones():
    """The mask of a shared row would be as wide as the longest of them."""
    rollouts = [rollout([1, 2, 3], [4]), rollout([1, 2, 3], [5]), rollout([9], range(50))]
    shared, single = micro_batches(rollouts, 10**6, 0, 1, shares_prompts=True)
    assert (shared.inputs_BT.shape, single.inputs_BT.shape) == ((1, 3), (1, 50))
    assert (shared.branches is None, single.branches is None) == (False, True)


def test_every_rank_has_a_row_where_rollouts_share_prompts():
    rollouts = [rollout([1, 2, 3], [4, 5, 6]) for _ in range(16)]
    for ranks in (1, 2, 4, 8):
        shares = [micro_batches(rollouts, 10**6, rank, ranks, shares_prompts=True) for rank in range(ranks)]
        assert [len(share) for share in shares] == [1] * ranks
        sizes = [len(share[0].targets_N) for share in shares]
        assert sum(sizes) == 48
        assert min(sizes) >= 48 // ranks // 2
