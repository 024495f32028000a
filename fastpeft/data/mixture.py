"""Several data sets as one, each with a weight."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset

from fastpeft.data.order import shuffled
from fastpeft.errors import UserError


class MixedDataset(Dataset[Any]):
    """Rows of several data sets; a weight says how often each row of its data set comes in an epoch.

    Weight 2 brings every row twice, 0.5 half of the rows, 1.5 every row once and half of them again. Which half is
    drawn by the seed, so that a run that is resumed has the same rows. Nothing is copied.

    Args:
        datasets: of one kind, such as `SFTDataset`.
        weights: one for each, above 0; None for 1.
        seed: draws the rows of a part of a data set.
    Attributes:
        parts: the data sets.
        counts: rows that an epoch has of each.
    Raises:
        UserError: there is no data set, or a weight is missing or is none.
    """

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        weights = [1.0] * len(datasets) if weights is None else list(weights)
        if not datasets or len(weights) != len(datasets):
            raise UserError(
                f"MixedDataset: {len(datasets)} data sets and {len(weights)} weights; give one weight for each"
            )
        for number, weight in enumerate(weights):
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise UserError(f"MixedDataset: weights[{number}] is {weight!r}; it must be a number above 0")
        self.parts = datasets
        self._seed = seed
        self.counts = [max(1, round(weight * len(dataset))) for dataset, weight in zip(datasets, weights, strict=True)]
        self._ends = list(accumulate(self.counts))

    @classmethod
    def by_shares(cls, datasets: Sequence[Any], shares: Sequence[float], seed: int = 0) -> MixedDataset:
        """Mix data sets so that each gives a share of the rows; an epoch has as many rows as all of them together.

        Args:
            datasets: of one kind.
            shares: one for each, above 0; only how they compare counts.
            seed: draws the rows of a part of a data set.
        """
        rows = sum(map(len, datasets)) / sum(shares)
        weights = [share * rows / len(dataset) for share, dataset in zip(shares, datasets, strict=True)]
        return cls(datasets, weights, seed)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        number, row = self._place(index)
        return self.parts[number][row]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def prompt_of(self, index: int) -> list[int]:
        """The tokens of an item's prompt, where the data sets can tell."""
        number, row = self._place(index)
        prompt: list[int] = self.parts[number].prompt_of(row)
        return prompt

    def _place(self, index: int) -> tuple[int, int]:
        """The data set of an item, and the row in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a mixture of {len(self)} rows")
        index %= len(self)
        number = bisect_right(self._ends, index)
        begin = self._ends[number] - self.counts[number]
        times, row = divmod(index - begin, len(self.parts[number]))
        if (times + 1) * len(self.parts[number]) > self.counts[number]:  # of the last round only a part comes
            row = int(shuffled(row, row + 1, len(self.parts[number]), self._seed + number, times)[0])
        return number, row

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        known = [dataset.lengths for dataset in self.parts]
        return [known[number][row] for number, row in map(self._place, range(len(self)))]

    @property
    def report(self) -> MixtureReport:
        """What became of the rows of each data set, and what comes from where."""
        parts = [dataset.report for dataset in self.parts]
        told = [f"{count:,} of {part.name}" for count, part in zip(self.counts, parts, strict=True)]
        return MixtureReport(parts, f"an epoch has {len(self):,} rows: {', '.join(told)}")


@dataclass(frozen=True)
class MixtureReport:
    """The reports of several data sets, and a line on how they are mixed."""

    parts: list[Any]
    mixture: str

    @property
    def name(self) -> str:
        """What messages call the mixture."""
        return ", ".join(part.name for part in self.parts)

    @property
    def longest(self) -> int:
        """Tokens of the longest row of all."""
        return max(int(part.longest) for part in self.parts)

    def summary(self) -> str:
        """The summaries of all, and the mixture."""
        return "\n".join([*(part.summary() for part in self.parts), self.mixture])
