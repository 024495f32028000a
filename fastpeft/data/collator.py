"""Tokenised rows -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpeft.data.sft import IGNORE_INDEX
from fastpeft.errors import UserError


@dataclass(frozen=True)
class SFTCollator:
    """Pad rows on the right and say at which positions the loss needs logits.

    Args:
        pad_token_id: token that fills the rows; it is masked out and never a target.
        pad_to_multiple_of: the batch is padded to a multiple of this many tokens, which tensor cores want.

    Calling it with a list of ``{"input_ids": list[int], "labels": list[int]}`` gives a dict of ``input_ids``,
    ``attention_mask`` and ``labels``, each int64 ``(b, t)``, and ``loss_positions``, int64 ``(p,)``: in ascending
    order, every position t at which some row's label at t + 1 is a target. A model called with
    ``logits_to_keep=loss_positions`` runs its output layer, often the dearest product of a small model, on these
    positions alone; the loss is the same.

    Items of a `PackedDataset` have ``position_ids`` too. Their batch has no ``attention_mask``: the positions, which
    begin again with each row, say who attends to whom, and padding is a row of its own. ``num_tokens``, int64 ``(b,)``,
    counts the tokens without it.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of < 1:
            raise UserError(f"SFTCollator: pad_to_multiple_of is {self.pad_to_multiple_of}; it must be 1 or more")

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad a list of rows into one batch; see the class."""
        lengths = [len(item["input_ids"]) for item in items]
        for index, item in enumerate(items):
            if len(item["labels"]) != lengths[index]:
                raise UserError(
                    f"SFTCollator: item {index} has {lengths[index]} input_ids and {len(item['labels'])} labels; "
                    "they must be equally many"
                )
        width = -(-max(lengths) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(items), width), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((len(items), width), IGNORE_INDEX, dtype=torch.int64)
        attention_mask = torch.zeros((len(items), width), dtype=torch.int64)
        for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
            input_ids[row, :length] = torch.as_tensor(item["input_ids"])
            labels[row, :length] = torch.as_tensor(item["labels"])
            attention_mask[row, :length] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if "position_ids" in items[0]:
            position_ids = torch.arange(width).repeat(len(items), 1)
            for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
                position_ids[row, :length] = torch.as_tensor(item["position_ids"])
                position_ids[row, length:] -= length
            batch["position_ids"], batch["num_tokens"] = position_ids, batch.pop("attention_mask").sum(dim=1)
        is_target = (labels != IGNORE_INDEX).any(dim=0)
        batch["loss_positions"] = is_target[1:].nonzero().flatten()
        return batch
