"""Records -> token rows for supervised fine-tuning: what the model reads, and on which tokens it is taught.

Every assistant turn and the end token after it are targets; `layout` says what the tokens are and what is cut from a
row that is too long. A row whose answer and EOS alone are too long is dropped and counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.data import Dataset

from fastpeft.data.columns import Column, RowBuilder
from fastpeft.data.forms import Record
from fastpeft.data.layout import Encoder, encode_all, fit
from fastpeft.data.records import OnBadRow, describe_complaints, read_records
from fastpeft.data.report import Report
from fastpeft.data.template import RowTemplate
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default ignore_index


@dataclass
class DataReport(Report):
    """What became of a source's rows; all counts are of rows or tokens.

    ``rows == kept + dropped_too_long + bad_rows``; ``cut_prompts`` and ``empty_outputs`` are among the kept. ``forms``
    counts the kept by the form of their rows.
    """

    cut_prompts: int = 0
    empty_outputs: int = 0
    bad_rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    shortest_dropped: int = 0
    forms: dict[str, int] = field(default_factory=dict)

    def finish(self, on_bad_row: OnBadRow) -> None:
        """Sum up, and raise UserError if bad rows stop a run or no row is left."""
        self.bad_rows = len(self.complaints)
        super().finish(on_bad_row)

    def nothing_left(self) -> str:
        """The message about a source of which no row is kept."""
        if self.dropped_too_long:
            return (
                f"{self.name}: no row is left to train on: {self.dropped_too_long} of {self.rows} rows have an "
                f"output of more than max_length={self.max_length} tokens (the shortest needs "
                f"{self.shortest_dropped}); raise max_length"
            )
        return describe_complaints(self.name, self.complaints, 0)

    def summary(self) -> str:
        """A line on what was kept, and a line for each thing a person should know."""
        lines = [
            f"{self.name}: {self.kept:,} of {self.rows:,} rows, {self.prompt_tokens:,} prompt and "
            f"{self.output_tokens:,} output tokens, longest row {self.longest:,} (limit {self.max_length:,}); "
            f"{forms_in_words(self.forms)}"
        ]
        if self.cut_prompts:
            lines.append(f"  {self.cut_prompts:,} too long: the beginning of the prompt was cut, the output is whole")
        if self.dropped_too_long:
            lines.append(
                f"  {self.dropped_too_long:,} dropped: the output alone is longer than {self.max_length:,} tokens"
            )
        if self.empty_outputs:
            lines.append(f"  {self.empty_outputs:,} with an empty output: they teach the model to answer nothing")
        return "\n".join([*lines, *self.bad_line()])


def forms_in_words(forms: Mapping[str, int]) -> str:
    """Which forms rows have, the commonest first, with counts where there are several."""
    if len(forms) < 2:
        return f"form: {next(iter(forms), 'none')}"
    common = sorted(forms.items(), key=lambda item: (-item[1], item[0]))
    return f"forms: {', '.join(f'{name} {count:,}' for name, count in common)}"


class SFTDataset(Dataset[dict[str, list[int]]]):
    """Tokenised rows: item i is ``{"input_ids": list[int], "labels": list[int]}``.

    Labels are the token itself where it is a target and `IGNORE_INDEX` elsewhere. All rows lie in one int32 tensor
    (a list of Python lists would take ten times the memory), with the targets' flags beside it.

    Args:
        tokens: int32 ``(total,)``, the rows one after another.
        is_target: bool ``(total,)``. A row's first token has nothing before it to predict it from, so it is no target;
            where it is marked, the row has no prompt.
        offsets: int64 ``(rows + 1,)``; row i is ``tokens[offsets[i]:offsets[i + 1]]``.
        report: what became of the source's rows.
    """

    def __init__(
        self, tokens: torch.Tensor, is_target: torch.Tensor, offsets: torch.Tensor, report: DataReport
    ) -> None:
        self._tokens = tokens
        self._is_target = is_target
        self._starts, self._lengths = offsets[:-1], offsets.diff()
        self.report = report

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a data set of {len(self)} rows")
        index %= len(self)
        start = int(self._starts[index])
        span = slice(start, start + int(self._lengths[index]))
        tokens = self._tokens[span]
        labels = tokens.masked_fill(~self._is_target[span], IGNORE_INDEX)
        labels[0] = IGNORE_INDEX
        return {"input_ids": tokens.tolist(), "labels": labels.tolist()}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Sequence[int]) -> SFTDataset:
        """Some of the rows, in the order given, without a copy of their tokens; the report stays that of all."""
        places = torch.tensor(indices, dtype=torch.int64)
        some = copy.copy(self)
        some._starts, some._lengths = self._starts[places], self._lengths[places]
        return some

    def prompt_of(self, index: int) -> list[int]:
        """The tokens before a row's (first) answer; the whole row where it has no prompt, as a text has none."""
        start, length = int(self._starts[index]), int(self._lengths[index])
        ids: list[int] = self._tokens[start : start + length].tolist()
        first = int(self._is_target[start : start + length].int().argmax())
        return ids[:first] or ids

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, for samplers that group rows of like length."""
        lengths: list[int] = self._lengths.tolist()
        return lengths


def build_sft_dataset(
    source: str | Path | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    on_bad_row: OnBadRow = "error",
    name: str | None = None,
    template: RowTemplate | None = None,
) -> SFTDataset:
    """Read training examples and turn them into token rows with targets on the answers and their EOS.

    Args:
        source: a JSON Lines file, or rows in memory, in one of the forms of `fastpeft.data.forms`.
        tokenizer: its chat template is used when it has one.
        max_length: tokens a row may have; longer rows lose prompt, never answer.
        on_bad_row: ``"error"`` to list the bad rows and stop, ``"skip"`` to leave them out and count them.
        name: what messages and the report call the source.
        template: what of a row is its prompt and its answer; None for rows in a known form.
    Returns:
        The data set; its ``report`` says what was kept, cut and dropped.
    Raises:
        UserError: the source cannot be read, has bad rows, or no row of it can be used.
    """
    check_options(max_length, on_bad_row, "build_sft_dataset")
    found = read_records(source, on_bad_row=on_bad_row, name=name, template=template)
    rows = TokenRows(DataReport(found.name, max_length, complaints=found.complaints))
    rows.add(found.records, Encoder(tokenizer))
    rows.report.finish(on_bad_row)
    return SFTDataset(**rows.tensors(), report=rows.report)


def check_options(max_length: int, on_bad_row: str, function: str) -> None:
    """Raise UserError for what is no length and no way with bad rows."""
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise UserError(f"{function}: max_length is {max_length!r}; it must be a whole number of 2 or more")
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"on_bad_row is {on_bad_row!r}; it must be 'error' or 'skip'")


class TokenRows(RowBuilder):
    """The rows of a `SFTDataset` as they are made of records."""

    columns: ClassVar = {"tokens": Column("<i4"), "is_target": Column("?"), "offsets": Column("<i8", ends_in="tokens")}
    report: DataReport

    def add(self, records: Sequence[Record], encoder: Encoder) -> None:
        """Tokenise records and make them fit; what the template refuses becomes a complaint."""
        report = self.report
        for row in encode_all(encoder, records, report.complaints):
            row, was_cut = fit(row, encoder, report.max_length)
            if len(row.ids) > report.max_length:
                report.dropped_too_long += 1
                report.shortest_dropped = min(report.shortest_dropped or row.answer_length, row.answer_length)
                continue
            flags = row.target_flags()
            report.kept += 1
            report.forms[row.record.form] = report.forms.get(row.record.form, 0) + 1
            report.cut_prompts += was_cut
            report.empty_outputs += any(turn.role == "assistant" and not turn.content for turn in row.record.turns)
            report.longest = max(report.longest, len(row.ids))
            report.output_tokens += sum(flags)
            report.prompt_tokens += len(row.ids) - sum(flags)
            self.data["tokens"].extend(row.ids)
            begin = row.answers[0][0]  # behind BOS, if there is one, where the row has no prompt
            flags[0] = begin == 0 or (begin == 1 and row.ids[0] == encoder.bos_token_id)
            self.data["is_target"].extend(flags)
            self.data["offsets"].append(len(self.data["tokens"]))
