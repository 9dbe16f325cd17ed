"""Every random choice is derived from the run's seed and its place, so that none has to be saved."""

import hashlib

import numpy as np

SAMPLER = "1"
"""How seeds become tokens, as a version: a run goes on by the one that it began with."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive(seed: int, *place: int | str) -> int:
    """A seed for one place of the run, e.g. `derive(seed, "sample", env, draw, rollout, turn)`.

    Units: 63-bit non-negative integer, which torch, numpy and vLLM all accept.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in place)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection on 64-bit integers.

    Shapes: (N,) uint64 -> (N,) uint64
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch: sorting by a keyed hash, so it is the same in every numpy version.

    Shapes: -> (size,) int64, each index once
    """
    base = np.uint64(derive(seed, "order", epoch))
    with np.errstate(over="ignore"):
        keys = _mix(base + np.arange(size, dtype=np.uint64) * _GOLDEN)
    return np.argsort(keys, kind="stable")


class EpochOrder:
    """Maps a global draw index to a row: order = f(seed, epoch, index). Its state is the index itself."""

    def __init__(self, seed: int, size: int) -> None:
        self._seed = seed
        self._size = size
        self._epoch = -1
        self._rows = np.empty(0, dtype=np.int64)

    def row(self, draw: int) -> int:
        epoch, index = divmod(draw, self._size)
        if epoch != self._epoch:
            self._rows = permutation(self._seed, epoch, self._size)
            self._epoch = epoch
        return int(self._rows[index])
