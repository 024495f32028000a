"""Compared answers as tokens, the three layouts of a batch, and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.data import PreferenceCollator, build_preference_dataset, build_prompt_dataset, encode_prompt
from fastpeft.errors import UserError

ROWS = [
    {"prompt": "the quick", "responses": [" brown fox", " lazy dog jumps", " red"], "ranking": [2, 1, 3]},
    {"prompt": "please send two red cups to Rome", "chosen": " the dog", "rejected": " cups"},
]


@pytest.mark.parametrize("template", [None, "chatml"])
def test_prompt_and_answers_as_in_fine_tuning(template: str | None, make_tokenizer: Any, chatml: str) -> None:
    tokenizer = make_tokenizer(chatml if template else None)
    item = build_preference_dataset(ROWS, tokenizer)[0]
    assert item["prompt_ids"] == encode_prompt({"prompt": "the quick"}, tokenizer)
    end = "<|end|>" if template else "</s>"
    texts = [tokenizer.decode(completion) for completion in item["completions"]]
    assert [text.strip() for text in texts] == [f"{text.strip()}{end}" for text in ROWS[0]["responses"]]
    assert item["pairs"] == [(1, 0), (0, 2), (1, 2)]


def test_a_text_dialogue_without_a_template(plain_tokenizer: Any) -> None:
    """The prompt stays the text it was, and an answer begins with the space after the colon."""
    hh = "\n\nHuman: the fox\n\nAssistant: the dog\n\nHuman: two cups\n\nAssistant: "
    item = build_preference_dataset([{"chosen": hh + "red", "rejected": hh + "lazy"}], plain_tokenizer)[0]
    assert plain_tokenizer.decode(item["prompt_ids"]) == hh.rstrip(" ")
    assert plain_tokenizer.decode(item["completions"][0]) == " red</s>"


def test_only_the_prompt_is_cut_and_alike_for_all_answers(plain_tokenizer: Any) -> None:
    whole = build_preference_dataset(ROWS, plain_tokenizer)
    longest = max(map(len, whole[1]["completions"]))
    limit = longest + 3
    found = build_preference_dataset([ROWS[1]], plain_tokenizer, max_length=limit)
    assert found[0]["completions"] == whole[1]["completions"]
    assert found[0]["prompt_ids"] == whole[1]["prompt_ids"][-3:]
    assert found.report.cut_prompts == 1
    with pytest.raises(UserError, match="no row is left") as error:
        build_preference_dataset([ROWS[1]], plain_tokenizer, max_length=longest)
    assert "1 dropped: an answer leaves no room for a prompt" in str(error.value)


def sequences(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Prompt and answer of each completion, read through the mask or positions as attention does."""
    found = []
    ids, positions = batch["input_ids"].flatten(), batch["position_ids"].flatten()
    width = batch["input_ids"].shape[1]
    for end in batch["ends"].tolist():
        row, column = divmod(end, width)
        if "attention_mask" not in batch:
            begin = end - int(positions[end])
            seen = list(range(begin, end + 1))
        elif batch["attention_mask"].dim() == 2:
            seen = [row * width + c for c in range(column + 1) if batch["attention_mask"][row, c]]
        else:
            seen = (row * width + batch["attention_mask"][row, 0, column].nonzero().flatten()).tolist()
        assert positions[seen].tolist() == list(range(len(seen)))
        found.append(ids[seen].tolist())
    return found


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_layouts_say_the_same(layout: str, plain_tokenizer: Any) -> None:
    items = list(build_preference_dataset(ROWS, plain_tokenizer))
    batch = PreferenceCollator(0, layout)(items)  # type: ignore[arg-type]
    expected = [[*item["prompt_ids"], *answer] for item in items for answer in item["completions"]]
    assert sequences(batch) == expected
    answers = [answer for item in items for answer in item["completions"]]
    for number, answer in enumerate(answers):
        own = batch["owners"] == number
        assert batch["targets"][own].tolist() == answer
        sources = batch["sources"][own].tolist()
        before = batch["input_ids"].flatten()[sources].tolist()
        assert before == expected[number][-len(answer) - 1 : -1], "each token is predicted by the one before it"
    assert batch["pairs"].tolist() == [[1, 0], [0, 2], [1, 2], [3, 4]]


def test_auto_shares_long_prompts(plain_tokenizer: Any) -> None:
    items = list(build_preference_dataset(ROWS, plain_tokenizer))
    long = [{**items[0], "prompt_ids": items[0]["prompt_ids"] * 8}]
    short = [{**items[0], "prompt_ids": items[0]["prompt_ids"][:1], "completions": [[5] * 30, [6] * 30, [7] * 30]}]
    assert PreferenceCollator(0)(long)["attention_mask"].dim() == 4
    assert PreferenceCollator(0)(short)["attention_mask"].dim() == 2
    assert "margins" not in PreferenceCollator(0)(long)
    assert PreferenceCollator(0)([{**items[1], "margins": [2.0]}])["margins"].tolist() == [2.0]


def test_padding_of_a_shared_batch_attends_to_itself(plain_tokenizer: Any) -> None:
    """A row of a mask without a true entry would be a softmax over nothing, NaN."""
    batch = PreferenceCollator(0, "shared")(list(build_preference_dataset(ROWS, plain_tokenizer)))
    assert batch["attention_mask"].any(-1).all()


def test_prompts(tmp_path: Path, plain_tokenizer: Any) -> None:
    rows: list[Any] = [
        {"prompt": "the fox", "answer": 7},
        {"input": "two cups", "output": "not read"},
        {"prompt": "the quick brown fox jumps over the lazy dog"},
        {"prompt": " "},
        {"question": "?"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        build_prompt_dataset(file, plain_tokenizer)
    assert f"{file}:4: the prompt is empty" in str(error.value) and f"{file}:5: no key" in str(error.value)
    found = build_prompt_dataset(file, plain_tokenizer, max_length=4, on_bad_row="skip")
    assert [item["prompt"] for item in found] == ["the fox", "two cups"]
    assert found[0] == {
        "input_ids": encode_prompt("the fox", plain_tokenizer),
        "prompt": "the fox",
        "columns": {"answer": 7},
    }
    assert "1 dropped: longer than 4 tokens" in found.report.summary()
    with pytest.raises(UserError, match="no prompt is left"):
        build_prompt_dataset([rows[2]], plain_tokenizer, max_length=4)
