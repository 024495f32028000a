"""Prompts to answer and learn from the answers, as PPO does: token rows, with what else the row holds beside them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastpeft.data.columns import Column, RowBuilder
from fastpeft.data.forms import PROMPT_KEYS, Record, parse_row
from fastpeft.data.layout import Encoder, prompt_ids
from fastpeft.data.records import OnBadRow, read_checked
from fastpeft.data.report import Report
from fastpeft.data.row_values import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class PromptReport(Report):
    """What became of a source's rows."""

    def summary(self) -> str:
        """A line on what was kept, and a line for each thing a person should know."""
        lines = [
            f"{self.name}: {self.kept:,} of {self.rows:,} prompts, longest {self.longest:,} tokens "
            f"(limit {self.max_length:,})"
        ]
        if self.dropped_too_long:
            lines.append(f"  {self.dropped_too_long:,} dropped: longer than {self.max_length:,} tokens")
        return "\n".join([*lines, *self.bad_line()])

    def nothing_left(self) -> str:
        """The message about a source of which no row is kept."""
        return f"{self.name}: no prompt is left\n{self.summary()}"


class PromptDataset(Dataset[dict[str, Any]]):
    """Tokenised prompts: item i is ``{"input_ids": list[int], "prompt": the row's prompt, "columns": its other keys}``.

    Args:
        tokens: int32 ``(total,)``, the prompts one after another.
        offsets: int64 ``(rows + 1,)``; prompt i is ``tokens[offsets[i]:offsets[i + 1]]``.
        given: for each row its prompt and its other keys, as the source has them.
        report: what became of the source's rows.
    """

    def __init__(
        self, tokens: Tensor, offsets: Tensor, given: Sequence[tuple[Any, dict[str, Any]]], report: PromptReport
    ) -> None:
        self._tokens, self._offsets, self._given = tokens, offsets, given
        self._places = torch.arange(len(offsets) - 1)
        self.report = report

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self._places[index])
        prompt, columns = self._given[row]
        ids = self._tokens[int(self._offsets[row]) : int(self._offsets[row + 1])].tolist()
        return {"input_ids": ids, "prompt": prompt, "columns": columns}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Sequence[int]) -> PromptDataset:
        """Some of the prompts, in the order given; the report stays that of all."""
        some = copy.copy(self)
        some._places = self._places[torch.tensor(indices, dtype=torch.int64)]
        return some


class JsonRows(Sequence[Any]):
    """Values written as JSON, read when they are asked for.

    Args:
        texts: uint8 ``(total,)``, one after another.
        offsets: int64 ``(values + 1,)``.
    """

    def __init__(self, texts: Tensor, offsets: Tensor) -> None:
        self._texts, self._offsets = texts, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        return json.loads(self._texts[int(self._offsets[index]) : int(self._offsets[index + 1])].numpy().tobytes())


def parse_prompt(row: Mapping[str, Any], where: str) -> tuple[Record, Mapping[str, Any]]:
    """Check one row; the record of its prompt, and the row.

    Args:
        row: the decoded JSON object.
        where: where it came from.
    Raises:
        RowError: the row is not of a known form, or holds no prompt.
    """
    record = parse_row(row, where, for_prompt=True)
    if not any(turn.content.strip() for turn in record.turns if turn.role != "assistant"):
        raise RowError("the prompt is empty; there is nothing to answer")
    return record, row


def build_prompt_dataset(
    source: str | Path | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    on_bad_row: OnBadRow = "error",
    name: str | None = None,
) -> PromptDataset:
    """Read prompts and turn them into tokens, as `encode_prompt` does for generation.

    Args:
        source: a JSON Lines file, or rows in memory, in a form of `fastpeft.data.forms` that has a prompt; an
            answer in a row is not read into the prompt. Other keys are kept for the reward function.
        tokenizer: its chat template is used when it has one.
        max_length: tokens a prompt may have; longer ones are dropped and counted.
        on_bad_row: ``"error"`` to list the bad rows and stop, ``"skip"`` to leave them out and count them.
        name: what messages and the report call the source.
    Raises:
        UserError: the source cannot be read, has bad rows, or no row of it can be used.
    """
    found = read_checked(source, parse_prompt, PROMPT_KEYS, on_bad_row=on_bad_row, name=name)
    rows = PromptRows(PromptReport(found.name, max_length, complaints=found.complaints))
    rows.add(found.records, Encoder(tokenizer))
    rows.report.finish(on_bad_row)
    tensors = rows.tensors()
    return PromptDataset(tensors["tokens"], tensors["offsets"], rows.given, rows.report)


class PromptRows(RowBuilder):
    """The rows of a `PromptDataset` as they are made; what stands beside the tokens is written only for a cache."""

    columns: ClassVar = {
        "tokens": Column("<i4"),
        "offsets": Column("<i8", ends_in="tokens"),
        "texts": Column("u1"),
        "text_offsets": Column("<i8", ends_in="texts"),
    }
    report: PromptReport

    def __init__(self, report: PromptReport) -> None:
        super().__init__(report)
        self.given: list[tuple[Any, dict[str, Any]]] = []

    def add(self, records: Sequence[tuple[Record, Mapping[str, Any]]], encoder: Encoder) -> None:
        """Tokenise prompts and leave out what is too long; what the template refuses becomes a complaint."""
        report = self.report
        for record, row in records:
            try:
                ids = prompt_ids(record, encoder)
            except RowError as complaint:
                report.complaints.append(f"{record.where}: {complaint}")
                continue
            if len(ids) > report.max_length:
                report.dropped_too_long += 1
                continue
            report.kept += 1
            report.longest = max(report.longest, len(ids))
            prompt, keys = _as_given(record, row)
            self.given.append((prompt, {name: value for name, value in row.items() if name not in keys}))
            self.data["tokens"].extend(ids)
            self.data["offsets"].append(len(self.data["tokens"]))

    def flatten(self) -> None:
        """Write what stands beside the tokens into columns, as JSON."""
        for value in self.given:
            self.data["texts"] += json.dumps(value).encode()
            self.data["text_offsets"].append(len(self.data["texts"]))
        self.given.clear()


def _as_given(record: Record, row: Mapping[str, Any]) -> tuple[Any, Sequence[str]]:
    """A row's prompt for the reward function, and the keys that make it up."""
    if record.form == "Alpaca":
        return record.turns[0].content, ("instruction", "input")
    if record.form == "ShareGPT":
        return [turn.as_dict() for turn in record.turns], ("conversations",)
    key = next(key for key in ("messages", "input", "prompt") if key in row)
    return row[key], (key,)
