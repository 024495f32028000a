"""Tokenised comparisons -> a batch: each answer once, with the places where its tokens are predicted.

Three layouts say the same to a model. ``padded`` has a row of tokens for each answer. ``packed`` puts them one after
another into a single row, without padding; positions that start again tell attention where one ends. ``shared`` has a
row for each prompt: the prompt once, then its answers, each of which attends to the prompt and to itself. Whatever the
layout, the trainer reads a batch by flat positions in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastpeft.errors import UserError

Layout = Literal["auto", "padded", "packed", "shared"]
LAYOUTS = ("auto", "padded", "packed", "shared")
_SHARED_PAYS = 0.8  # of the tokens of the padded layout; attention with a mask of its own costs a little more


@dataclass(frozen=True)
class PreferenceCollator:
    """Lay comparisons out as one batch.

    Args:
        pad_token_id: token that fills rows; it is masked out.
        layout: one of `LAYOUTS`; ``auto`` takes ``shared`` where that saves a fifth of the tokens, else ``padded``.
        pad_to_multiple_of: rows are padded to a multiple of this many tokens.

    Called with items of a `PreferenceDataset`, it gives a dict of

    - ``input_ids``, ``position_ids``: int64 ``(b, t)``; ``attention_mask``: int64 ``(b, t)`` (padded), bool
      ``(b, 1, t, t)`` (shared), absent (packed);
    - ``sources``, ``targets``, ``owners``: int64 ``(n,)``, for each token of an answer the flat position that predicts
      it, the token, and the answer's number;
    - ``ends``: int64 ``(s,)``, flat position of each answer's last token;
    - ``pairs``: int64 ``(p, 2)``, numbers of the better and the worse answer; ``margins``: float32 ``(p,)`` if given;
    - ``ref_logps``: float32 ``(s,)`` if the items have them.
    """

    pad_token_id: int
    layout: Layout = "auto"
    pad_to_multiple_of: int = 8

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"PreferenceCollator: layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}")
        if self.pad_to_multiple_of < 1:
            raise UserError(
                f"PreferenceCollator: pad_to_multiple_of is {self.pad_to_multiple_of}; it must be 1 or more"
            )

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Lay out a batch; see the class."""
        layout = self._choose(items) if self.layout == "auto" else self.layout
        rows = _shared_rows(items) if layout == "shared" else _single_rows(items)
        if layout == "packed":
            rows = [_join(rows)]
        width = max(len(row.ids) for row in rows)
        if layout != "packed":
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = self._stack(rows, width)
        if layout == "padded":
            batch["attention_mask"] = (batch.pop("segments") >= 0).long()
        elif layout == "shared":
            batch["attention_mask"] = _shared_mask(batch.pop("segments"))
        else:
            del batch["segments"]
        return {**batch, **_comparisons(items)}

    def _choose(self, items: Sequence[dict[str, Any]]) -> Layout:
        shared = max(len(item["prompt_ids"]) + sum(map(len, item["completions"])) for item in items) * len(items)
        widest = max(len(item["prompt_ids"]) + max(map(len, item["completions"])) for item in items)
        padded = widest * sum(len(item["completions"]) for item in items)
        return "shared" if shared <= _SHARED_PAYS * padded else "padded"

    def _stack(self, rows: Sequence[_Row], width: int) -> dict[str, Tensor]:
        ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64)
        positions = torch.zeros((len(rows), width), dtype=torch.int64)
        segments = torch.full((len(rows), width), -1, dtype=torch.int64)
        sources: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        ends: list[int] = []
        for index, row in enumerate(rows):
            length = len(row.ids)
            ids[index, :length] = torch.tensor(row.ids)
            positions[index, :length] = torch.tensor(row.positions)
            segments[index, :length] = torch.tensor(row.segments)
            for before, begin, end in row.answers:
                first = index * width
                sources += [first + before, *range(first + begin, first + end - 1)]
                targets += row.ids[begin:end]
                owners += [len(ends)] * (end - begin)
                ends.append(first + end - 1)
        numbers = {"sources": sources, "targets": targets, "owners": owners, "ends": ends}
        return {
            "input_ids": ids,
            "position_ids": positions,
            "segments": segments,
            **{name: torch.tensor(values, dtype=torch.int64) for name, values in numbers.items()},
        }


@dataclass
class _Row:
    """A row of tokens; segment 0 is the prompt, i the i-th answer; an answer is (place before it, begin, end)."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    answers: list[tuple[int, int, int]]


def _single_rows(items: Sequence[dict[str, Any]]) -> list[_Row]:
    rows = []
    for item in items:
        prompt = item["prompt_ids"]
        for completion in item["completions"]:
            ids = [*prompt, *completion]
            rows.append(_Row(ids, list(range(len(ids))), [0] * len(ids), [(len(prompt) - 1, len(prompt), len(ids))]))
    return rows


def _shared_rows(items: Sequence[dict[str, Any]]) -> list[_Row]:
    rows = []
    for item in items:
        prompt = item["prompt_ids"]
        row = _Row([*prompt], list(range(len(prompt))), [0] * len(prompt), [])
        for number, completion in enumerate(item["completions"], 1):
            begin = len(row.ids)
            row.ids += completion
            row.positions += range(len(prompt), len(prompt) + len(completion))
            row.segments += [number] * len(completion)
            row.answers.append((len(prompt) - 1, begin, len(row.ids)))
        rows.append(row)
    return rows


def _join(rows: Sequence[_Row]) -> _Row:
    """All rows as one."""
    joined = _Row([], [], [], [])
    for row in rows:
        shift = len(joined.ids)
        joined.ids += row.ids
        joined.positions += row.positions
        joined.segments += row.segments
        joined.answers += [(before + shift, begin + shift, end + shift) for before, begin, end in row.answers]
    return joined


def _shared_mask(segments: Tensor) -> Tensor:
    """``(b, 1, t, t)``: who attends to whom; padding attends to itself, or its softmax would be over nothing."""
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    return (causal & ((key == 0) & (query >= 0) | (key == query)))[:, None]


def _comparisons(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    pairs: list[tuple[int, int]] = []
    margins: list[float] = []
    reference: list[float] = []
    count = 0
    for item in items:
        pairs += [(count + better, count + worse) for better, worse in item["pairs"]]
        margins += item["margins"] or [0.0] * len(item["pairs"])
        reference += item.get("ref_logps", [])
        count += len(item["completions"])
    found = {"pairs": torch.tensor(pairs, dtype=torch.int64)}
    if any(item["margins"] for item in items):
        found["margins"] = torch.tensor(margins)
    if len(reference) == count:
        found["ref_logps"] = torch.tensor(reference)
    return found
