"""Padding, masks, and the positions the loss needs."""

from __future__ import annotations

import pytest
import torch

from fastpeft.data import IGNORE_INDEX, SFTCollator
from fastpeft.errors import UserError

X = IGNORE_INDEX
ITEMS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [X, X, X, 8, 9]},
    {"input_ids": [1, 2, 3], "labels": [X, 2, 3]},
]


def test_rows_are_padded_on_the_right_and_masked():
    batch = SFTCollator(pad_token_id=0, pad_to_multiple_of=4)(ITEMS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[X, X, X, 8, 9, X, X, X], [X, 2, 3, X, X, X, X, X]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_loss_positions_are_those_before_a_target_of_any_row():
    """Row 0 predicts at 2 and 3 (targets at 3 and 4), row 1 at 0 and 1."""
    batch = SFTCollator(pad_token_id=0)(ITEMS)
    assert batch["loss_positions"].tolist() == [0, 1, 2, 3]
    assert SFTCollator(pad_token_id=0)(ITEMS[:1])["loss_positions"].tolist() == [2, 3]


def test_loss_on_the_positions_is_the_loss_on_all():
    torch.manual_seed(0)
    batch = SFTCollator(pad_token_id=0)(ITEMS)
    logits = torch.randn(*batch["input_ids"].shape, 11)
    labels, positions = batch["labels"], batch["loss_positions"]
    everywhere = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    chosen = torch.nn.functional.cross_entropy(logits[:, positions].flatten(0, 1), labels[:, positions + 1].flatten())
    torch.testing.assert_close(chosen, everywhere)


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (2, 6), (5, 5), (8, 8)])
def test_width_is_a_multiple(multiple, width):
    assert SFTCollator(0, pad_to_multiple_of=multiple)(ITEMS)["input_ids"].shape == (2, width)


def test_a_pad_token_that_is_also_eos_stays_a_target_where_it_is_one():
    batch = SFTCollator(pad_token_id=9)(ITEMS)
    assert batch["labels"][0].tolist() == [X, X, X, 8, 9, X, X, X]


def test_a_batch_without_targets_has_no_positions():
    batch = SFTCollator(0)([{"input_ids": [1, 2], "labels": [X, X]}])
    assert batch["loss_positions"].shape == (0,)


def test_bad_arguments():
    with pytest.raises(UserError, match="pad_to_multiple_of is 0"):
        SFTCollator(0, pad_to_multiple_of=0)
    with pytest.raises(UserError, match="item 1 has 2 input_ids and 1 labels"):
        SFTCollator(0)([ITEMS[0], {"input_ids": [1, 2], "labels": [1]}])
