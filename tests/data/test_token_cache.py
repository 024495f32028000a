"""Tokens on disk: the rows of training, found again by content, and never half of them."""

from __future__ import annotations

import json

import pytest

from fastpeft.data import (
    build_preference_dataset,
    build_prompt_dataset,
    build_sft_dataset,
    cached_preference_dataset,
    cached_prompt_dataset,
    cached_sft_dataset,
    token_cache,
)
from fastpeft.errors import UserError

ROWS = [
    {"input": f"please send {i} cups " * (1 + i % 9), "output": "" if i % 7 == 0 else f"to Rome {i}"}
    for i in range(150)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" + "\n" * (i % 40 == 0) for i, row in enumerate(ROWS)))
    return path


@pytest.fixture
def no_work(monkeypatch):
    """Call it, and from then on nothing may be tokenised."""

    def refuse(*_):
        raise AssertionError("tokenised again")

    return lambda: monkeypatch.setattr(token_cache, "_write", refuse)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_rows_and_the_report_are_those_without_a_cache(tmp_path, file, chat_tokenizer, monkeypatch, workers):
    monkeypatch.setattr("fastpeft.data.parts._PART", 3000)
    plain = build_sft_dataset(file, chat_tokenizer, max_length=60)
    cached = cached_sft_dataset(file, chat_tokenizer, tmp_path / "cache", max_length=60, workers=workers)
    assert list(cached) == list(plain) and cached.lengths == plain.lengths
    assert vars(cached.report) == vars(plain.report)
    assert plain.report.cut_prompts and plain.report.empty_outputs
    assert [*cached.select([5, 2])] == [plain[5], plain[2]]


def test_it_is_found_again_and_only_for_the_same_content(tmp_path, file, plain_tokenizer, chat_tokenizer, no_work):
    cache = tmp_path / "cache"
    first = cached_sft_dataset(file, plain_tokenizer, cache, workers=1)
    plain_tokenizer(["a", "b c"], truncation=True, max_length=4)  # leaves its mark in the backend
    moved = file.rename(tmp_path / "moved.jsonl")
    count = len(list(cache.iterdir()))
    cached_sft_dataset(moved, plain_tokenizer, cache, max_length=99, workers=1)
    cached_sft_dataset(moved, chat_tokenizer, cache, workers=1)
    assert len(list(cache.iterdir())) == count + 2 == 3
    no_work()
    again = cached_sft_dataset(moved, plain_tokenizer, cache, workers=1)
    assert list(again) == list(first) and again.report.name == str(moved)
    with moved.open("a") as text:
        text.write(json.dumps({"input": "one", "output": "more"}) + "\n")
    with pytest.raises(AssertionError, match="tokenised again"):
        cached_sft_dataset(moved, plain_tokenizer, cache, workers=1)


def test_what_is_cut_short_is_made_again(tmp_path, file, plain_tokenizer):
    cache = tmp_path / "cache"
    first = [*cached_sft_dataset(file, plain_tokenizer, cache, workers=1)]
    (folder,) = cache.iterdir()
    (folder / "tokens").write_bytes((folder / "tokens").read_bytes()[:-4])
    assert [*cached_sft_dataset(file, plain_tokenizer, cache, workers=1)] == first
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_bad_rows_are_told_of_with_their_lines_and_leave_nothing_behind(tmp_path, file, plain_tokenizer, monkeypatch):
    monkeypatch.setattr("fastpeft.data.parts._PART", 3000)
    cache = tmp_path / "cache"
    lines = file.read_text().splitlines()
    lines[100], lines[120] = '{"inptu": "a"}', "{"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        cached_sft_dataset(file, plain_tokenizer, cache, workers=1)
    assert f"{file}:101: no key" in str(caught.value) and f"{file}:121: not valid JSON" in str(caught.value)
    assert list(cache.iterdir()) == []
    skipped = cached_sft_dataset(file, plain_tokenizer, cache, workers=1, on_bad_row="skip")
    assert skipped.report.bad_rows == 2 and len(skipped) == 148
    with pytest.raises(UserError, match="2 of 150 rows cannot be used"):
        cached_sft_dataset(file, plain_tokenizer, cache, workers=1)


def test_bad_arguments(tmp_path, file, plain_tokenizer):
    with pytest.raises(UserError, match="cached_sft_dataset: max_length is 1"):
        cached_sft_dataset(file, plain_tokenizer, tmp_path, max_length=1)
    with pytest.raises(UserError, match="no such file"):
        cached_sft_dataset(tmp_path / "x.jsonl", plain_tokenizer, tmp_path)
    with pytest.raises(UserError, match="the cache of tokens cannot be written"):
        cached_sft_dataset(file, plain_tokenizer, file / "cache", workers=1)


def test_comparisons_from_a_cache_are_those_without(tmp_path, chat_tokenizer, monkeypatch):
    monkeypatch.setattr("fastpeft.data.parts._PART", 2000)
    rows = [
        {"prompt": f"send {i} cups " * (1 + i % 9), "chosen": "to Rome", "rejected": "no", "margin": 0.5 * i}
        if i % 3
        else {"prompt": f"the fox {i}", "responses": ["red dog", "lazy", "the"], "ranking": [2, 1, 1 + i % 2]}
        for i in range(60)
    ]
    rows[7] = {"prompt": "the fox", "chosen": "red", "rejected": "red"}
    path = write(tmp_path / "pairs.jsonl", rows)
    plain = build_preference_dataset(path, chat_tokenizer, max_length=40)
    cached = cached_preference_dataset(path, chat_tokenizer, tmp_path / "cache", max_length=40, workers=2)
    assert list(cached) == list(plain) and cached.completion_counts == plain.completion_counts
    assert list(cached.tokens()) == list(plain.tokens())
    assert vars(cached.report) == vars(plain.report)
    report = plain.report
    assert report.cut_prompts and report.tied_pairs and report.equal_at == [f"{path}:8"]
    assert {item["margins"] is None for item in plain} == {True, False}
    few = cached.select([5, 2])
    assert [item["prompt_ids"] for item in few] == [plain[5]["prompt_ids"], plain[2]["prompt_ids"]]
    few.attach_reference([[0.0] * count for count in few.completion_counts])
    assert few.has_reference and not cached.has_reference and few[1]["index"] == 1


def test_prompts_from_a_cache_are_those_without(tmp_path, plain_tokenizer, monkeypatch):
    monkeypatch.setattr("fastpeft.data.parts._PART", 500)
    rows = [{"prompt": "the fox " * (1 + i % 4), "answer": i, "known": {"x": [None, 1.5, "ü"]}} for i in range(40)]
    path = write(tmp_path / "prompts.jsonl", rows)
    plain = build_prompt_dataset(path, plain_tokenizer, max_length=7)
    cached = cached_prompt_dataset(path, plain_tokenizer, tmp_path / "cache", max_length=7, workers=2)
    assert list(cached) == list(plain) and vars(cached.report) == vars(plain.report)
    assert plain.report.dropped_too_long == 10 and plain[1]["columns"] == {"answer": 1, "known": rows[1]["known"]}
    assert list(cached.select([3])) == [plain[3]]


def test_a_cache_keeps_kinds_of_rows_apart(tmp_path, plain_tokenizer):
    """The same file as prompts and as examples: other rows, and no folder of the one is taken for the other's."""
    path = write(tmp_path / "rows.jsonl", [{"input": "the fox", "output": "red"}])
    for _ in range(2):
        (row,) = cached_sft_dataset(path, plain_tokenizer, tmp_path / "cache", max_length=64, workers=1)
        (prompt,) = cached_prompt_dataset(path, plain_tokenizer, tmp_path / "cache", max_length=64, workers=1)
        assert len(row["input_ids"]) > len(prompt["input_ids"]) and prompt["prompt"] == "the fox"
    assert len(list((tmp_path / "cache").iterdir())) == 2
