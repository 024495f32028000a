"""In which order rows are met: a shuffle that is computed, not stored, and batches of rows of like length.

The i-th row of an epoch is a function of i, the seed and the epoch: a Feistel network over as many bits as the number
of rows needs, walked on where it leaves their range. So a shuffle of any number of rows takes no memory, and a run that
is resumed needs nothing but its position.

Source: J. Black and P. Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002 (cycle walking).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from fastpeft.errors import UserError

_ROUNDS = 4  # Luby and Rackoff: four make a permutation that looks random
_BLOCK = 1 << 16  # indices computed at once
_BATCHES = 50  # in a group that is sorted by length, as in transformers

_Indices = np.ndarray[Any, np.dtype[np.int64]]


def shuffled(start: int, stop: int, count: int, seed: int, epoch: int) -> _Indices:
    """The rows at some positions of an epoch.

    Args:
        start: the first position.
        stop: one past the last.
        count: rows in all.
        seed: draws another order.
        epoch: draws another order too.
    Returns:
        Their indices, int64 ``(stop - start,)``.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = _mixed(np.arange(1, _ROUNDS + 1, dtype=np.uint64) + _mixed(np.uint64(seed) + _mixed(np.uint64(epoch))))
    index = _feistel(np.arange(start, stop, dtype=np.uint64), half, keys)
    while (outside := index >= count).any():
        index[outside] = _feistel(index[outside], half, keys)
    found: _Indices = index.astype(np.int64)
    return found


def _feistel(index: Any, half: int, keys: Any) -> Any:
    mask = np.uint64((1 << half) - 1)
    left, right = index >> np.uint64(half), index & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return left << np.uint64(half) | right


def _mixed(value: Any) -> Any:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


class ComputedShuffle(Sampler[int]):
    """Every row once an epoch, in an order that takes no memory.

    Args:
        count: rows.
        seed: draws another order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch; accelerate calls this."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for start, stop in self._blocks(_BLOCK):
            yield from shuffled(start, stop, self._count, self._seed, self._epoch).tolist()

    def _blocks(self, size: int) -> Iterator[tuple[int, int]]:
        return ((start, min(start + size, self._count)) for start in range(0, self._count, size))


class LengthGrouped(ComputedShuffle):
    """Rows of like length in one batch: a shuffle, of which every fifty batches are sorted and shuffled as batches.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch.
        seed: draws another order.
    Raises:
        UserError: a batch has no row.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise UserError(f"LengthGrouped: batch_size is {batch_size}; it must be 1 or more")
        super().__init__(len(lengths), seed)
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        for start, stop in self._blocks(_BATCHES * self._batch_size):
            rows = shuffled(start, stop, self._count, self._seed, self._epoch)
            rows = rows[np.argsort(-self._lengths[rows], kind="stable")]
            batches = np.split(rows, range(self._batch_size, len(rows), self._batch_size))
            last = [batches.pop()] if len(batches[-1]) < self._batch_size else []  # a smaller one ends the epoch
            for place in shuffled(0, len(batches), len(batches), self._seed + start, self._epoch) if batches else ():
                yield from batches[place].tolist()
            for rows in last:
                yield from rows.tolist()
