"""Prompts to answer and learn from the answers, as PPO does: token rows, with what else the row holds beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from fastpeft.data.forms import PROMPT_KEYS, Record, parse_row
from fastpeft.data.layout import encode_prompt
from fastpeft.data.records import OnBadRow, describe_complaints, read_checked
from fastpeft.data.row_values import RowError
from fastpeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class PromptReport:
    """What became of a source's rows."""

    name: str
    max_length: int
    rows: int = 0
    kept: int = 0
    dropped_too_long: int = 0
    longest: int = 0
    complaints: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line on what was kept, and a line for each thing a person should know."""
        lines = [
            f"{self.name}: {self.kept:,} of {self.rows:,} prompts, longest {self.longest:,} tokens "
            f"(limit {self.max_length:,})"
        ]
        if self.dropped_too_long:
            lines.append(f"  {self.dropped_too_long:,} dropped: longer than {self.max_length:,} tokens")
        if self.complaints:
            more = f" and {len(self.complaints) - 3:,} more" if len(self.complaints) > 3 else ""
            lines.append(f"  {len(self.complaints):,} bad, left out: {' | '.join(self.complaints[:3])}{more}")
        return "\n".join(lines)


class PromptDataset(Dataset[dict[str, Any]]):
    """Tokenised prompts: item i is ``{"input_ids": list[int], "prompt": the row's prompt, "columns": its other keys}``.

    Args:
        items: the items.
        report: what became of the source's rows.
    """

    def __init__(self, items: Sequence[dict[str, Any]], report: PromptReport) -> None:
        self._items = items
        self.report = report

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._items)

    def select(self, indices: Sequence[int]) -> PromptDataset:
        """Some of the prompts, in the order given; the report stays that of all."""
        return PromptDataset([self._items[index] for index in indices], self.report)


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
    report = PromptReport(found.name, max_length, complaints=found.complaints)
    items = []
    for record, row in found.records:
        try:
            ids = encode_prompt(record, tokenizer)
        except UserError as error:
            report.complaints.append(str(error).removeprefix("encode_prompt: "))
            continue
        if len(ids) > max_length:
            report.dropped_too_long += 1
            continue
        prompt, keys = _as_given(record, row)
        report.longest = max(report.longest, len(ids))
        columns = {name: value for name, value in row.items() if name not in keys}
        items.append({"input_ids": ids, "prompt": prompt, "columns": columns})
    if report.complaints and on_bad_row == "error":
        raise UserError(describe_complaints(found.name, report.complaints, len(items)))
    report.kept = len(items)
    report.rows = report.kept + report.dropped_too_long + len(report.complaints)
    if not items:
        raise UserError(f"{report.name}: no prompt is left\n{report.summary()}")
    return PromptDataset(items, report)


def _as_given(record: Record, row: Mapping[str, Any]) -> tuple[Any, Sequence[str]]:
    """A row's prompt for the reward function, and the keys that make it up."""
    if record.form == "Alpaca":
        return record.turns[0].content, ("instruction", "input")
    if record.form == "ShareGPT":
        return [turn.as_dict() for turn in record.turns], ("conversations",)
    key = next(key for key in ("messages", "input", "prompt") if key in row)
    return row[key], (key,)
