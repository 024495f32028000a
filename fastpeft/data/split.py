"""Held-out rows: taken from the training data by a fraction, and looked for in it where they come from elsewhere.

A row whose prompt was trained on says little about new prompts. So a split puts rows with equal prompts on one side;
`leaks` counts the rows of one data set whose prompts stand in another. Prompts are compared as the model reads them;
a text, which has none, is compared as a whole.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from fastpeft.errors import UserError


@dataclass(frozen=True)
class Split:
    """A data set in two parts.

    Args:
        train: rows to train on.
        held_out: rows to evaluate on.
        kept_together: held-out rows whose prompt another of them has; apart, they would have been known from training.
        name: of the source, for messages.
    """

    train: Any
    held_out: Any
    kept_together: int
    name: str

    def summary(self) -> str:
        """What was held out, in a line."""
        together = f"; {self.kept_together:,} of them share a prompt and stay together" if self.kept_together else ""
        return f"{self.name}: {len(self.train):,} rows to train on, {len(self.held_out):,} held out{together}"


def split_dataset(dataset: Any, fraction: float, seed: int = 0) -> Split:
    """Hold out a share of the rows, drawn by their prompts: the same rows whatever their order in the file.

    Args:
        dataset: an `SFTDataset`, `PreferenceDataset` or `PromptDataset`.
        fraction: the share to hold out, above 0 and below 1. Where many rows have one prompt, it is met as nearly as
            whole groups allow.
        seed: draws other rows.
    Raises:
        UserError: the fraction is out of range, or one side would be empty.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise UserError(f"split_dataset: fraction is {fraction!r}; it must be above 0 and below 1")
    groups: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(_prompts(dataset, seed)):
        groups.setdefault(prompt, []).append(index)
    wanted = max(1, round(fraction * len(dataset)))
    chosen: list[int] = []
    together = 0
    for prompt in sorted(groups):  # a hash is as good as a draw
        group = groups[prompt]
        if len(chosen) >= wanted:
            break
        # A group is left out where its rows beyond the wanted ones outweigh those that are missing.
        if len(chosen) + len(group) - wanted <= wanted - len(chosen):
            chosen += group
            together += len(group) if len(group) > 1 else 0
    if not chosen or len(chosen) == len(dataset):
        raise UserError(
            f"{dataset.report.name}: {len(dataset):,} rows with {len(groups):,} different prompts cannot be split with "
            f"{fraction:g} held out, as rows with one prompt stay together; give held-out rows of their own"
        )
    held = set(chosen)
    rest = [index for index in range(len(dataset)) if index not in held]
    return Split(dataset.select(rest), dataset.select(sorted(chosen)), together, dataset.report.name)


def leaks(train: Any, held_out: Any) -> list[int]:
    """Which held-out rows have a prompt that is trained on.

    Args:
        train: what is trained on.
        held_out: what is not; both are data sets of one kind.
    Returns:
        Their indices in ``held_out``.
    """
    known = set(_prompts(train))
    return [index for index, prompt in enumerate(_prompts(held_out)) if prompt in known]


def leak_warning(train: Any, held_out: Any) -> str | None:
    """A line on held-out rows whose prompts are trained on; None where there are none."""
    count = len(leaks(train, held_out))
    if not count:
        return None
    return (
        f"{held_out.report.name}: {count:,} of {len(held_out):,} rows have a prompt that {train.report.name} has too, "
        "so the evaluation says less of new prompts ('fastpeft check' names them)"
    )


def _prompts(dataset: Any, seed: int = 0) -> Iterator[bytes]:
    """A hash of what stands before the (first) answer of each row, as tokens; of the whole row where nothing does."""
    salt = seed.to_bytes(8, "little", signed=True)
    for index, item in enumerate(dataset):
        if "labels" in item:
            ids = dataset.prompt_of(index)
        else:
            ids = item["prompt_ids"] if "prompt_ids" in item else item["input_ids"]
        yield blake2b(array("i", ids).tobytes(), digest_size=16, salt=salt).digest()
