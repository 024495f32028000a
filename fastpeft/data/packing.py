"""Several rows in one sequence, so that next to nothing of a batch is padding.

Rows are put together once, longest first, each into the fullest sequence that still has room (best-fit decreasing):
never more than 11/9 of the fewest possible sequences and one, and for rows of mixed lengths hardly more than those. A
row is never cut. Positions begin again with each row; by that attention tells where a row begins, and rows do not see
each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset

from fastpeft.errors import UserError


class _Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put rows together by best-fit decreasing.

    Args:
        lengths: tokens of each row.
        max_length: tokens of a sequence.
    Returns:
        For each sequence the indices of its rows; every row is in one of them.
    Raises:
        UserError: a row is longer than a sequence.
    Source:
        D. S. Johnson, Near-optimal bin packing algorithms, 1973.
    """
    sequences: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # the sequences that have so much room left
    rooms = 0  # bit n is set where some sequence has room for exactly n tokens
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if length > max_length:
            raise UserError(f"pack: row {index} has {length} tokens, and a sequence {max_length}; raise max_length")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = max_length, len(sequences)
            sequences.append([])
        sequences[sequence].append(index)
        left = room - length
        if left:
            with_room.setdefault(left, []).append(sequence)
            rooms |= 1 << left
    return sequences


class PackedDataset(Dataset[dict[str, list[int]]]):
    """Sequences of several rows: item i is ``{"input_ids", "labels", "position_ids"}``, lists of equal length.

    Args:
        rows: items with ``input_ids`` and ``labels``, whose first label is no target.
        lengths: tokens of each row.
        max_length: tokens of a sequence.
    Raises:
        UserError: a row is longer than a sequence.
    """

    def __init__(self, rows: _Rows, lengths: Sequence[int], max_length: int) -> None:
        self._rows = rows
        self._sequences = pack(lengths, max_length)
        self.lengths = [sum(lengths[index] for index in sequence) for sequence in self._sequences]
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        item: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in map(self._rows.__getitem__, self._sequences[index]):
            item["input_ids"] += row["input_ids"]
            item["labels"] += row["labels"]
            item["position_ids"] += range(len(row["input_ids"]))
        return item

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))

    @property
    def padding(self) -> float:
        """The share of padding, were every sequence filled up to ``max_length``."""
        return 1 - sum(self.lengths) / (len(self) * self._max_length)

    def summary(self) -> str:
        """What became of the rows, in a line."""
        return (
            f"packed {len(self._rows):,} rows into {len(self):,} sequences of up to {self._max_length:,} tokens, "
            f"{self.padding:.1%} of them padding"
        )
