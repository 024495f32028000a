"""Compared answers -> tokens, and batches of them in one of three layouts.

The answers to a prompt are laid out as in supervised fine-tuning (`layout`); a row that is too long loses prompt, the
same for all its answers, never answer. A batch holds every answer once, however many pairs it is in.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from fastpeft.data.comparisons import COMPARISON_KEYS, Comparison, parse_comparison
from fastpeft.data.forms import Message, Record
from fastpeft.data.layout import Encoder, Row, encode_all, fit
from fastpeft.data.records import OnBadRow, describe_complaints, read_checked
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5  # places named in a report


@dataclass
class PreferenceReport:
    """What became of a source's rows."""

    name: str
    max_length: int
    rows: int = 0
    kept: int = 0
    pairs: int = 0
    cut_prompts: int = 0
    dropped_too_long: int = 0
    tied_pairs: int = 0
    equal_at: list[str] = field(default_factory=list)
    without_pairs: int = 0
    longest: int = 0
    complaints: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line on what was kept, and a line for each thing a person should know."""
        lines = [
            f"{self.name}: {self.kept:,} of {self.rows:,} rows, {self.pairs:,} pairs, longest {self.longest:,} tokens "
            f"(limit {self.max_length:,})"
        ]
        if self.cut_prompts:
            lines.append(f"  {self.cut_prompts:,} too long: the beginning of the prompt was cut, the answers are whole")
        if self.dropped_too_long:
            lines.append(f"  {self.dropped_too_long:,} dropped: an answer leaves no room for a prompt")
        if self.equal_at:
            shown = ", ".join(self.equal_at[:_SHOWN]) + (", ..." if len(self.equal_at) > _SHOWN else "")
            lines.append(f"  {len(self.equal_at):,} with equal answers, of which no pair was made: {shown}")
        if self.tied_pairs:
            lines.append(f"  {self.tied_pairs:,} pairs of a ranking are ties and were left out")
        if self.complaints:
            more = f" and {len(self.complaints) - 3:,} more" if len(self.complaints) > 3 else ""
            lines.append(f"  {len(self.complaints):,} bad, left out: {' | '.join(self.complaints[:3])}{more}")
        return "\n".join(lines)


class PreferenceDataset(Dataset[dict[str, Any]]):
    """Tokenised comparisons.

    Item i is ``{"prompt_ids": list[int], "completions": list[list[int]], "pairs": [(better, worse), ...], "margins":
    list[float] or None, "index": i}``, and ``"ref_logps": list[float]`` once `attach_reference` gave them.

    Args:
        items: prompt, completions, pairs and margins of each row.
        report: what became of the source's rows.
    """

    def __init__(
        self,
        items: Sequence[tuple[array[int], list[array[int]], tuple[tuple[int, int], ...], tuple[float, ...] | None]],
        report: PreferenceReport,
    ) -> None:
        self._items = items
        self._reference: list[list[float]] | None = None
        self.report = report

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, completions, pairs, margins = self._items[index]
        item: dict[str, Any] = {
            "prompt_ids": prompt.tolist(),
            "completions": [completion.tolist() for completion in completions],
            "pairs": list(pairs),
            "margins": None if margins is None else list(margins),
            "index": index % len(self),
        }
        if self._reference is not None:
            item["ref_logps"] = self._reference[index]
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Sequence[int]) -> PreferenceDataset:
        """Some of the rows, in the order given, without a reference; the report stays that of all."""
        return PreferenceDataset([self._items[index] for index in indices], self.report)

    def attach_reference(self, logps: list[list[float]] | None) -> None:
        """Add a log-probability of each completion under a reference, or take them away.

        Args:
            logps: for each row one number a completion.
        Raises:
            ValueError: they are not as many as the rows and completions.
        """
        if logps is not None and [len(row) for row in logps] != [len(row[1]) for row in self._items]:
            raise ValueError("attach_reference: the log-probabilities are not one for each completion")
        self._reference = logps

    @property
    def has_reference(self) -> bool:
        """Whether items come with ``ref_logps``."""
        return self._reference is not None

    @property
    def completion_counts(self) -> list[int]:
        """Completions of each row."""
        return [len(completions) for _, completions, _, _ in self._items]

    def tokens(self) -> Iterator[array[int]]:
        """Every sequence of tokens in a fixed order: what a hash of the data is made of."""
        for prompt, completions, _, _ in self._items:
            yield prompt
            yield from completions


def build_preference_dataset(
    source: str | Path | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    on_bad_row: OnBadRow = "error",
    name: str | None = None,
) -> PreferenceDataset:
    """Read compared answers and turn them into tokens.

    Args:
        source: a JSON Lines file, or rows in memory, in one of the forms of `fastpeft.data.comparisons`.
        tokenizer: its chat template is used when it has one.
        max_length: tokens that prompt and answer may have together.
        on_bad_row: ``"error"`` to list the bad rows and stop, ``"skip"`` to leave them out and count them.
        name: what messages and the report call the source.
    Returns:
        The data set; its ``report`` says what was kept, cut and left out.
    Raises:
        UserError: the source cannot be read, has bad rows, or no row of it can be used.
    """
    found = read_checked(source, parse_comparison, COMPARISON_KEYS, on_bad_row=on_bad_row, name=name)
    report = PreferenceReport(found.name, max_length, complaints=found.complaints)
    encoder = Encoder(tokenizer)
    report.tied_pairs = sum(comparison.tied for comparison in found.records)
    report.equal_at = [comparison.where for comparison in found.records if comparison.equal]
    usable = [comparison for comparison in found.records if comparison.pairs]
    report.without_pairs = len(found.records) - len(usable)
    encoded: dict[str, list[Row]] = {}
    complaints: list[str] = []
    records = [record for comparison in usable for record in records_of(comparison, encoder)]
    for row in encode_all(encoder, records, complaints):
        encoded.setdefault(row.record.where, []).append(row)
    report.complaints += dict.fromkeys(complaints)  # a prompt that the template refuses is so with every answer
    items = []
    for comparison in usable:
        rows = encoded.get(comparison.where, [])
        if len(rows) < len(comparison.responses):
            continue
        item = fit_together(rows, encoder, max_length)
        if item is None:
            report.dropped_too_long += 1
            continue
        prompt, completions, was_cut = item
        report.cut_prompts += was_cut
        report.pairs += len(comparison.pairs)
        report.longest = max(report.longest, len(prompt) + max(map(len, completions)))
        items.append((prompt, completions, comparison.pairs, comparison.margins))
    if report.complaints and on_bad_row == "error":
        raise UserError(describe_complaints(found.name, report.complaints, len(items)))
    report.kept = len(items)
    report.rows = report.kept + report.without_pairs + report.dropped_too_long + len(report.complaints)
    if not items:
        raise UserError(f"{report.name}: no row is left to learn from\n{report.summary()}")
    return PreferenceDataset(items, report)


def records_of(comparison: Comparison, encoder: Encoder) -> list[Record]:
    """Prompt and answer of a comparison, as one record for each answer."""
    prompt = comparison.prompt
    if comparison.text is not None and not encoder.has_template:
        prompt = (Message("user", comparison.text),)
    # The text form of hh-rlhf has "Assistant: " before an answer, and the space belongs to it as in training on texts.
    separator = " " if comparison.text and not comparison.text[-1].isspace() else ""
    return [Record((*prompt, Message("assistant", text)), comparison.where, separator) for text in comparison.responses]


def fit_together(
    rows: Sequence[Row], encoder: Encoder, max_length: int
) -> tuple[array[int], list[array[int]], bool] | None:
    """Prompt and completions, the prompt cut for the longest of them; None if that is too long by itself."""
    longest = max(rows, key=lambda row: len(row.ids))
    fitted, was_cut = fit(longest, encoder, max_length)
    prompt = fitted.ids[: fitted.answers[-1][0]]
    if len(fitted.ids) > max_length or not prompt:  # nothing would be there to predict the first token from
        return None
    completions = [array("i", row.ids[row.answers[-1][0] : row.answers[-1][1]]) for row in rows]
    return array("i", prompt), completions, was_cut
