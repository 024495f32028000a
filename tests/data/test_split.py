"""Held-out rows: how many, always the same, and none whose prompt is trained on."""

from __future__ import annotations

import pytest

from fastpeft.data import (
    build_preference_dataset,
    build_prompt_dataset,
    build_sft_dataset,
    leak_warning,
    leaks,
    split_dataset,
)
from fastpeft.errors import UserError

ROWS = [{"input": f"number {i // 2 if i < 40 else i}", "output": f"answer {i}"} for i in range(200)]


def rows_of(dataset):
    return [tuple(item["input_ids"]) for item in dataset]


def test_a_split_is_a_partition_near_the_fraction_that_keeps_prompts_together(plain_tokenizer):
    dataset = build_sft_dataset(ROWS, plain_tokenizer)
    split = split_dataset(dataset, 0.2)
    assert sorted(rows_of(split.train) + rows_of(split.held_out)) == sorted(rows_of(dataset))
    assert len(split.held_out) in (39, 40, 41)
    assert leaks(split.train, split.held_out) == []
    assert split.kept_together > 0 and f"{split.kept_together} of them share a prompt" in split.summary()
    labels = {tuple(item["input_ids"]): item["labels"] for item in dataset}
    assert all(item["labels"] == labels[tuple(item["input_ids"])] for item in split.held_out)


def test_the_same_rows_are_held_out_whatever_their_order_and_others_with_another_seed(plain_tokenizer):
    forward, backward = (build_sft_dataset(rows, plain_tokenizer) for rows in (ROWS, ROWS[::-1]))
    one, other = split_dataset(forward, 0.1), split_dataset(backward, 0.1)
    assert sorted(rows_of(one.held_out)) == sorted(rows_of(other.held_out))
    assert rows_of(one.held_out) != rows_of(split_dataset(forward, 0.1, seed=1).held_out)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, True, "0.1"])
def test_a_fraction_out_of_range(plain_tokenizer, fraction):
    with pytest.raises(UserError, match="must be above 0 and below 1"):
        split_dataset(build_sft_dataset(ROWS, plain_tokenizer), fraction)


def test_rows_of_one_prompt_cannot_be_split(plain_tokenizer):
    dataset = build_sft_dataset([{"input": "a", "output": str(i)} for i in range(9)], plain_tokenizer)
    with pytest.raises(UserError, match="9 rows with 1 different prompts cannot be split"):
        split_dataset(dataset, 0.3)


def test_leaks_are_counted_by_prompt_and_not_by_answer(plain_tokenizer):
    train = build_sft_dataset(ROWS, plain_tokenizer, name="train.jsonl")
    held = build_sft_dataset([{"input": "number 3", "output": "x"}, {"input": "new", "output": "answer 3"}],
                             plain_tokenizer, name="val.jsonl")  # fmt: skip
    assert leaks(train, held) == [0]
    assert leak_warning(train, held).startswith("val.jsonl: 1 of 2 rows have a prompt that train.jsonl has too")
    assert leak_warning(held, split_dataset(train, 0.5).held_out.select([0])) is None


def test_preferences_and_prompts_split_too(plain_tokenizer):
    pairs = [{"prompt": f"p {i // 3}", "chosen": "yes", "rejected": f"no {i}"} for i in range(60)]
    prompts = [{"prompt": f"p {i}", "gold": i} for i in range(50)]
    for dataset in (build_preference_dataset(pairs, plain_tokenizer), build_prompt_dataset(prompts, plain_tokenizer)):
        split = split_dataset(dataset, 0.25)
        assert len(split.train) + len(split.held_out) == len(dataset)
        assert leaks(split.train, split.held_out) == []
        assert type(split.held_out) is type(dataset)
