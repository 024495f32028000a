"""Rows put together: none is lost or cut, little is padding, and a batch says where each begins."""

from __future__ import annotations

import random

import pytest

from fastpeft.data import IGNORE_INDEX, PackedDataset, SFTCollator, build_sft_dataset, pack
from fastpeft.errors import UserError


def worked_problem_lengths(count: int) -> list[int]:
    """Lengths like those of grade-school problems with worked answers: 60 to 500 tokens, mostly about 200."""
    drawn = random.Random(0)
    return [max(60, min(500, round(drawn.lognormvariate(5.3, 0.35)))) for _ in range(count)]


@pytest.mark.parametrize(
    "lengths",
    [[5], [8, 8, 8], [7, 1, 6, 2, 5, 3], [1] * 30, [3, 3, 3, 3], random.Random(1).choices(range(1, 9), k=200)],
    ids=["one", "whole", "pairs", "ones", "threes", "mixed"],
)
def test_every_row_is_in_one_sequence_and_none_is_too_long(lengths):
    sequences = pack(lengths, 8)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in sequence) <= 8 for sequence in sequences)
    fewest = -(-sum(lengths) // 8)
    assert len(sequences) <= fewest * 11 / 9 + 1


def test_the_fullest_sequence_with_room_is_taken():
    assert pack([6, 5, 2, 3, 1], 8) == [[0, 2], [1, 3], [4]]
    assert pack([4, 7, 1, 4], 8) == [[1, 2], [0, 3]]


def test_less_than_two_percent_is_padding():
    """The bar of the design, on rows as long as those it is measured on."""
    lengths = worked_problem_lengths(7000)
    sequences = pack(lengths, 2048)
    assert 1 - sum(lengths) / (2048 * len(sequences)) < 0.02


def test_a_row_that_is_too_long_is_refused():
    with pytest.raises(UserError, match="row 1 has 9 tokens, and a sequence 8; raise max_length"):
        pack([3, 9], 8)


def test_positions_begin_again_and_first_tokens_are_no_targets(plain_tokenizer):
    rows = build_sft_dataset([{"input": "a" * i, "output": "b"} for i in range(6)], plain_tokenizer)
    packed = PackedDataset(rows, rows.lengths, 16)
    assert sum(packed.lengths) == sum(rows.lengths)
    found = []
    for item in packed:
        starts = [index for index, position in enumerate(item["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(item["input_ids"])], strict=True):
            assert item["position_ids"][start:end] == list(range(end - start))
            assert item["labels"][start] == IGNORE_INDEX
            found.append((item["input_ids"][start:end], item["labels"][start:end]))
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows)
    assert "packed 6 rows into" in packed.summary()


def test_a_batch_has_positions_in_place_of_a_mask():
    items = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9], "position_ids": [0, 1, 0, 1, 2]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "position_ids": [0, 1, 2]},
    ]
    batch = SFTCollator(pad_token_id=3)(items)
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 3, 3], [5, 6, 7, 3, 3, 3, 3, 3]]
    assert batch["num_tokens"].tolist() == [5, 3]
    assert batch["loss_positions"].tolist() == [0, 1, 2, 3]
