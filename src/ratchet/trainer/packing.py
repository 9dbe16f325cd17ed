"""From samples of any length to micro-batches: a pure function of the lengths, the budget and the ranks.

Rows are padded at the right and sorted by length, so that little is padded; each micro-batch holds at most
`budget` cells. Where each shape costs a compilation, rows and widths are filled up to powers of two. Needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NARROWEST = 16
"""Width of a micro-batch of few shapes, at least."""


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


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass, shifted for next-token prediction.

    Shapes: inputs_BT, targets_BT int64; mask_BT bool; behaviour_N, advantages_N float32, for the N targets that
    the mask selects in row-major order.
    """

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    mask_BT: np.ndarray
    behaviour_N: np.ndarray
    advantages_N: np.ndarray

    @property
    def cells_N(self) -> np.ndarray:
        """Where the N inputs are whose next token counts: row * T + position. Worked out here, because asking
        the device would make it wait for everything before."""
        return np.flatnonzero(self.mask_BT)

    @property
    def targets_N(self) -> np.ndarray:
        return self.targets_BT[self.mask_BT]


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


def micro_batches(
    examples: Sequence[Example], budget: int, rank: int, ranks: int, *, few_shapes: bool = False
) -> list[MicroBatch]:
    """This rank's share of a step. Every rank gets the same number, filled up with rows that count nothing."""
    useful = [e for e in examples if e.trained_tokens]
    lengths = [len(e.token_ids) - 1 for e in useful]
    groups = split([_width(n) for n in lengths] if few_shapes else lengths, budget)
    if len(groups) < ranks:  # one pass would do, but every rank should have its part of it
        order = [index for group in groups for index in group]
        groups = [part for part in (order[i::ranks] for i in range(ranks)) if part]
    mine = [[useful[i] for i in group] for group in groups[rank::ranks]]
    most = -(-len(groups) // ranks)
    filler = [Example(useful[0].token_ids[:2], [False, False], [0.0, 0.0])] if useful else []
    shares = [*mine, *[filler] * (most - len(mine))]
    return [_collate(rows, *_shape(rows, budget, few_shapes=few_shapes)) for rows in shares]


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _width(length: int) -> int:
    return max(_NARROWEST, _power_of_two(length))


def _shape(rows: Sequence[Example], budget: int, *, few_shapes: bool) -> tuple[int, int]:
    """Rows and inputs a row; of few shapes within the budget, as far as what is there fits in it."""
    height, width = len(rows), max(len(row.token_ids) for row in rows) - 1
    if not few_shapes:
        return height, width
    width = _width(width)
    return max(height, min(_power_of_two(height), budget // width)), width


def _collate(rows: Sequence[Example], height: int, width: int) -> MicroBatch:
    ids = np.zeros((height, width + 1), dtype=np.int64)
    mask = np.zeros((height, width + 1), dtype=bool)
    behaviour = np.zeros((height, width + 1), dtype=np.float32)
    for i, row in enumerate(rows):
        length = len(row.token_ids)
        ids[i, :length] = row.token_ids
        mask[i, :length] = row.mask
        if row.logprobs is not None:
            behaviour[i, :length] = row.logprobs
    mask_BT = mask[:, 1:]
    advantages = np.zeros(height, dtype=np.float32)
    advantages[: len(rows)] = [row.advantage for row in rows]
    return MicroBatch(
        inputs_BT=ids[:, :-1],
        targets_BT=ids[:, 1:],
        mask_BT=mask_BT,
        behaviour_N=behaviour[:, 1:][mask_BT],
        advantages_N=np.broadcast_to(advantages[:, None], mask_BT.shape)[mask_BT],
    )
