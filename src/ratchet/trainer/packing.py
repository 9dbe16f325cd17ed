"""From samples of any length to micro-batches: a pure function of the lengths, the budget and the ranks.

    examples ─► rows, where sequences that begin alike share their beginning ─► micro-batches of rows of similar width

Rows are padded at the right and sorted by width, so that little is padded; each micro-batch holds at most `budget`
cells. Where each shape costs a compilation, rows and widths are filled up to powers of two. Needs no torch.

    a row of three rollouts of one task:   p p p p a a b b b b c c c
    what `a` and `c` see of it:            p p p p a a         and  p p p p             c c c
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_NARROWEST = 16
"""Width of a micro-batch of few shapes, at least."""
_BRANCHING_AT_MOST = 5
"""Cells of a row behind its common beginning, as a multiple of that: attention is computed between all cells of a row,
also those that do not see each other."""
_WIDEST_SHARED = 1024
"""Inputs of a row of several sequences: its mask is dense."""


@dataclass(frozen=True)
class Example:
    """One sequence to train on: `mask[i]` says that token i is learnt; behaviour and advantage are RL's."""

    token_ids: Sequence[int]
    mask: Sequence[bool]
    logprobs: Sequence[float] | None = None
    advantage: float = 0.0

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss: the first one has nothing before it."""
        return sum(self.mask[1:])

    @property
    def prompt(self) -> tuple[int, ...]:
        """What lies before the first token that counts."""
        learnt = (i for i, is_learnt in enumerate(self.mask) if is_learnt and i > 0)
        return tuple(self.token_ids[: next(learnt, len(self.mask))])


@dataclass(frozen=True)
class Row:
    """Sequences of which the first `trunk` tokens are the same and stand there once; or one sequence, and no trunk."""

    examples: tuple[Example, ...]
    trunk: int = 0

    @property
    def width(self) -> int:
        """Inputs: the last token of a sequence is a target only."""
        return self.trunk + sum(_branch(example, self.trunk) for example in self.examples)


class Branches(NamedTuple):
    """What a model must be told about rows that share a beginning.

    Shapes: positions_BT, owners_BT int64. Owner 0 is the trunk, which all later cells of its row see; the others
    see each other only where their owners are equal.
    """

    positions_BT: np.ndarray
    owners_BT: np.ndarray


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass, shifted for next-token prediction.

    Shapes: inputs_BT int64. Of each of N tokens that count: cells_N int64, where its predecessor is (row * T + column;
    sequences that share a beginning share its last cell); targets_N int64; behaviour_N, advantages_N float32.
    """

    inputs_BT: np.ndarray
    cells_N: np.ndarray
    targets_N: np.ndarray
    behaviour_N: np.ndarray
    advantages_N: np.ndarray
    branches: Branches | None
    """None where each row is one sequence: plain causal attention."""


def split(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group row indices so that rows x longest <= budget, longest first; a row above the budget stands alone."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def share_prompts(examples: Sequence[Example], budget: int, ranks: int = 1) -> list[Row]:
    """Rows of sequences whose prompts are equal, in the order in which prompts appear, none wider than the budget.

    No row has more than its share of the step behind its trunk, so that there is one for each rank.
    """
    by_prompt: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(example.prompt, []).append(example)
    behind = sum(_branch(e, len(prompt)) for prompt, same in by_prompt.items() for e in same)
    share = max(1, behind // ranks)
    rows: list[Row] = []
    for prompt, same in by_prompt.items():
        room = min(_BRANCHING_AT_MOST * len(prompt), min(budget, _WIDEST_SHARED) - len(prompt), share)
        rows += _fill(same, len(prompt), room)
    return rows


def _fill(examples: list[Example], trunk: int, room: int) -> list[Row]:
    """As few rows as there is room for behind the trunk, about equally wide."""
    cells = sum(_branch(example, trunk) for example in examples)
    rows = -(-cells // max(room, 1))
    fair = max(1, -(-cells // max(rows, 1)))
    filled: list[list[Example]] = []
    used = 0
    for example in examples:
        size = _branch(example, trunk)
        if not filled or (size and used >= fair) or used + size > room:
            filled.append([])
            used = 0
        filled[-1].append(example)
        used += size
    return [Row(tuple(row), trunk if len(row) > 1 else 0) for row in filled]


def micro_batches(
    examples: Sequence[Example],
    budget: int,
    rank: int,
    ranks: int,
    *,
    few_shapes: bool = False,
    shares_prompts: bool = False,
) -> list[MicroBatch]:
    """This rank's share of a step. Every rank gets the same number, filled up with rows that count nothing."""
    useful = [e for e in examples if e.trained_tokens]
    rows = share_prompts(useful, budget, ranks) if shares_prompts else [Row((e,)) for e in useful]
    # Apart: the mask of shared rows is as wide as the widest row beside them, and single rows need none.
    kinds = ([row for row in rows if len(row.examples) > 1], [row for row in rows if len(row.examples) == 1])
    groups = [group for kind in kinds for group in _group(kind, budget, few_shapes=few_shapes)]
    _halve(groups, ranks)
    mine = groups[rank::ranks]
    most = -(-len(groups) // ranks)
    filler = [Row((Example(useful[0].token_ids[:2], [False, False], [0.0, 0.0]),))] if useful else []
    shares = [*mine, *[filler] * (most - len(mine))]
    return [_collate(share, *_shape(share, budget, few_shapes=few_shapes)) for share in shares]


def _group(rows: Sequence[Row], budget: int, *, few_shapes: bool) -> list[list[Row]]:
    widths = [_width(row.width) if few_shapes else row.width for row in rows]
    return [[rows[i] for i in group] for group in split(widths, budget)]


def _halve(groups: list[list[Row]], ranks: int) -> None:
    """Fewer passes would do, but every rank should have its part: divide the highest as long as there are too few."""
    while len(groups) < ranks:
        highest = max(groups, key=len, default=[])
        if len(highest) < 2:
            return
        groups.remove(highest)
        groups += [highest[::2], highest[1::2]]


def _branch(example: Example, trunk: int) -> int:
    """Inputs of a sequence behind the trunk."""
    return len(example.token_ids) - 1 - trunk


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _width(length: int) -> int:
    return max(_NARROWEST, _power_of_two(length))


def _shape(rows: Sequence[Row], budget: int, *, few_shapes: bool) -> tuple[int, int]:
    """Rows and inputs a row; of few shapes within the budget, as far as what is there fits in it."""
    height, width = len(rows), max(row.width for row in rows)
    if not few_shapes:
        return height, width
    width = _width(width)
    return max(height, min(_power_of_two(height), budget // width)), width


def _collate(rows: Sequence[Row], height: int, width: int) -> MicroBatch:
    inputs, positions, owners = (np.zeros((height, width), dtype=np.int64) for _ in range(3))
    cells, targets, behaviour, advantages = [], [], [], []
    for i, row in enumerate(rows):
        begin = row.trunk
        for owner, example in enumerate(row.examples, start=1):
            ids, learnt = np.asarray(example.token_ids), np.asarray(example.mask)[1:]
            at = np.arange(len(ids) - 1)
            column = np.where(at < row.trunk, at, begin + at - row.trunk)
            inputs[i, column] = ids[:-1]
            positions[i, column] = at
            owners[i, column[row.trunk :]] = owner
            begin += _branch(example, row.trunk)
            cells.append(i * width + column[learnt])
            targets.append(ids[1:][learnt])
            logprobs = np.zeros(len(ids)) if example.logprobs is None else np.asarray(example.logprobs)
            behaviour.append(logprobs[1:][learnt])
            advantages.append(np.full(int(learnt.sum()), example.advantage))
    return MicroBatch(
        inputs_BT=inputs,
        cells_N=np.concatenate(cells).astype(np.int64),
        targets_N=np.concatenate(targets).astype(np.int64),
        behaviour_N=np.concatenate(behaviour).astype(np.float32),
        advantages_N=np.concatenate(advantages).astype(np.float32),
        branches=Branches(positions, owners) if any(len(row.examples) > 1 for row in rows) else None,
    )
