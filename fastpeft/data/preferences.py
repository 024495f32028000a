"""Compared answers -> tokens, and batches of them in one of three layouts.

The answers to a prompt are laid out as in supervised fine-tuning (`layout`); a row that is too long loses prompt, the
same for all its answers, never answer. A batch holds every answer once, however many pairs it is in.
"""

from __future__ import annotations

import copy
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastpeft.data.columns import Column, RowBuilder
from fastpeft.data.comparisons import COMPARISON_KEYS, Comparison, parse_comparison
from fastpeft.data.forms import Message, Record
from fastpeft.data.layout import Encoder, Row, encode_all, fit
from fastpeft.data.records import OnBadRow, read_checked
from fastpeft.data.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5  # places named in a report


@dataclass
class PreferenceReport(Report):
    """What became of a source's rows; ``equal_at`` are the places of rows with equal answers."""

    pairs: int = 0
    cut_prompts: int = 0
    tied_pairs: int = 0
    equal_at: list[str] = field(default_factory=list)
    without_pairs: int = 0

    def left_out(self) -> int:
        """Rows that are as they should be and of no use."""
        return self.dropped_too_long + self.without_pairs

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
        return "\n".join([*lines, *self.bad_line()])


class PreferenceDataset(Dataset[dict[str, Any]]):
    """Tokenised comparisons.

    Item i is ``{"prompt_ids": list[int], "completions": list[list[int]], "pairs": [(better, worse), ...], "margins":
    list[float] or None, "index": i}``, and ``"ref_logps": list[float]`` once `attach_reference` gave them.

    Args:
        tokens: int32 ``(total,)``, each row's prompt and completions one after another.
        offsets: int64 ``(sequences + 1,)``; a prompt or a completion is ``tokens[offsets[j]:offsets[j + 1]]``.
        rows: int64 ``(rows + 1,)``; row i has the sequences from ``rows[i]`` to ``rows[i + 1]``, the prompt first.
        pairs: int32 ``(2 pairs,)``, numbers of the better and the worse completion.
        margins: float64 ``(pairs,)``, NaN where a row gives none.
        pair_offsets: int64 ``(rows + 1,)``; row i has the pairs from ``pair_offsets[i]`` to ``pair_offsets[i + 1]``.
        report: what became of the source's rows.
    """

    def __init__(
        self,
        tokens: Tensor,
        offsets: Tensor,
        rows: Tensor,
        pairs: Tensor,
        margins: Tensor,
        pair_offsets: Tensor,
        report: PreferenceReport,
    ) -> None:
        self._tokens, self._offsets, self._rows = tokens, offsets, rows
        self._pairs, self._margins, self._pair_offsets = pairs.view(-1, 2), margins, pair_offsets
        self._places = torch.arange(len(rows) - 1)
        self._reference: list[list[float]] | None = None
        self.report = report

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a data set of {len(self)} rows")
        index %= len(self)
        row = int(self._places[index])
        span = slice(int(self._pair_offsets[row]), int(self._pair_offsets[row + 1]))
        prompt, *completions = (sequence.tolist() for sequence in self._sequences(row))
        margins = self._margins[span].tolist()
        item: dict[str, Any] = {
            "prompt_ids": prompt,
            "completions": completions,
            "pairs": list(map(tuple, self._pairs[span].tolist())),
            "margins": None if math.isnan(margins[0]) else margins,
            "index": index,
        }
        if self._reference is not None:
            item["ref_logps"] = self._reference[index]
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def _sequences(self, row: int) -> Iterator[Tensor]:
        """A row's prompt and completions."""
        bounds = self._offsets[int(self._rows[row]) : int(self._rows[row + 1]) + 1].tolist()
        return (self._tokens[begin:end] for begin, end in pairwise(bounds))

    def select(self, indices: Sequence[int]) -> PreferenceDataset:
        """Some of the rows, in the order given, without a copy of their tokens and without a reference.

        The report stays that of all.
        """
        some = copy.copy(self)
        some._places, some._reference = self._places[torch.tensor(indices, dtype=torch.int64)], None
        return some

    def attach_reference(self, logps: list[list[float]] | None) -> None:
        """Add a log-probability of each completion under a reference, or take them away.

        Args:
            logps: for each row one number a completion.
        Raises:
            ValueError: they are not as many as the rows and completions.
        """
        if logps is not None and [len(row) for row in logps] != self.completion_counts:
            raise ValueError("attach_reference: the log-probabilities are not one for each completion")
        self._reference = logps

    @property
    def has_reference(self) -> bool:
        """Whether items come with ``ref_logps``."""
        return self._reference is not None

    @property
    def completion_counts(self) -> list[int]:
        """Completions of each row."""
        counts: list[int] = (self._rows.diff()[self._places] - 1).tolist()
        return counts

    def tokens(self) -> Iterator[array[int]]:
        """Every sequence of tokens in a fixed order: what a hash of the data is made of."""
        for row in self._places.tolist():
            yield from (array("i", sequence.tolist()) for sequence in self._sequences(row))


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
    rows = ComparisonRows(PreferenceReport(found.name, max_length, complaints=found.complaints))
    rows.add(found.records, Encoder(tokenizer))
    rows.report.finish(on_bad_row)
    return PreferenceDataset(**rows.tensors(), report=rows.report)


class ComparisonRows(RowBuilder):
    """The rows of a `PreferenceDataset` as they are made of comparisons."""

    columns: ClassVar = {
        "tokens": Column("<i4"),
        "offsets": Column("<i8", ends_in="tokens"),
        "rows": Column("<i8", ends_in="offsets"),
        "pairs": Column("<i4"),
        "margins": Column("<f8"),
        "pair_offsets": Column("<i8", ends_in="margins"),
    }
    report: PreferenceReport

    def add(self, records: Sequence[Comparison], encoder: Encoder) -> None:
        """Tokenise comparisons and make them fit; what the template refuses becomes a complaint."""
        report = self.report
        report.tied_pairs += sum(comparison.tied for comparison in records)
        report.equal_at += [comparison.where for comparison in records if comparison.equal]
        usable = [comparison for comparison in records if comparison.pairs]
        report.without_pairs += len(records) - len(usable)
        encoded: dict[str, list[Row]] = {}
        complaints: list[str] = []
        answers = [record for comparison in usable for record in records_of(comparison, encoder)]
        for row in encode_all(encoder, answers, complaints):
            encoded.setdefault(row.record.where, []).append(row)
        report.complaints += dict.fromkeys(complaints)  # a prompt that the template refuses is so with every answer
        for comparison in usable:
            rows = encoded.get(comparison.where, [])
            if len(rows) < len(comparison.responses):
                continue
            item = fit_together(rows, encoder, report.max_length)
            if item is None:
                report.dropped_too_long += 1
                continue
            prompt, completions, was_cut = item
            report.kept += 1
            report.cut_prompts += was_cut
            report.pairs += len(comparison.pairs)
            report.longest = max(report.longest, len(prompt) + max(map(len, completions)))
            self._append(prompt, completions, comparison)

    def _append(self, prompt: array[int], completions: Sequence[array[int]], comparison: Comparison) -> None:
        data = self.data
        for sequence in (prompt, *completions):
            data["tokens"].extend(sequence)
            data["offsets"].append(len(data["tokens"]))
        data["rows"].append(len(data["offsets"]) - 1)
        data["pairs"].extend(number for pair in comparison.pairs for number in pair)
        data["margins"].extend(comparison.margins or [math.nan] * len(comparison.pairs))
        data["pair_offsets"].append(len(data["margins"]))


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
