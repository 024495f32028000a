"""Counting rows without tokenising each: the numbers are those of training, whatever tokenizer and template."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastpeft.data import build_preference_dataset, build_prompt_dataset, build_sft_dataset
from fastpeft.data.layout import Encoder
from fastpeft.data.skeleton import find_skeleton
from fastpeft.data.survey import CUT, DROPPED, EMPTY, survey
from fastpeft.data.token_counts import TokenCounter
from fastpeft.errors import UserError

ODD_TEXTS = [
    "the quick fox", " the quick", "two  spaces", "a\n\nb", "tab\there", "end \n next", "no\u00a0break", "x\u2028y z",
    "Über 日本 語 done", "e\u0301 f\u0301 g", "\r\nwindows\r\nlines", "trailing ", "", "12 345 6,789.0",
    "<|end|> in text", "user\nassistant", "zero\0byte here", "\n\n\n", "a" * 50, "foo \u0301bar", "one\x1ctwo three",
    "😀 😀",
]  # fmt: skip
STRIPS = "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>\n' }}{% endfor %}" \
         "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"  # fmt: skip
LOOKS_INSIDE = STRIPS.replace("m['content'] | trim", "m['content'].split('</think>')[-1]")
COUNTS_LETTERS = STRIPS.replace("'\n' + m", "'\n' + ('long ' if m['content'] | length > 60 else '') + m")


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(params=["plain", "bos", "chatml", "strips", "looks-inside", "counts-letters"])
def tokenizer(request, make_tokenizer, chatml):
    templates = {"chatml": chatml, "strips": STRIPS, "looks-inside": LOOKS_INSIDE, "counts-letters": COUNTS_LETTERS}
    return make_tokenizer(templates.get(request.param), add_bos=request.param == "bos")


def rows_of_all_sorts():
    return [{"input": one, "output": other} for one in ODD_TEXTS for other in ODD_TEXTS]


def test_counts_are_those_of_training(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", rows_of_all_sorts())
    found = survey(path, tokenizer, max_length=4096, workers=1)
    dataset = build_sft_dataset(path, tokenizer, max_length=4096, on_bad_row="skip")
    assert found.rows["tokens"].tolist() == dataset.lengths
    assert int(found.rows["targets"].sum()) >= dataset.report.output_tokens  # a first token has nothing to learn from
    assert found.bad == dataset.report.bad_rows
    assert found.count(EMPTY) == dataset.report.empty_outputs


@pytest.mark.parametrize("max_length", [12, 20, 40])
def test_what_is_cut_and_dropped_is_what_training_cuts_and_drops(tmp_path, tokenizer, max_length):
    rows = rows_of_all_sorts()
    if tokenizer.chat_template:
        rows += [{"messages": [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, four, strict=True)]}
                 for four in zip(*(ODD_TEXTS[i:] + ODD_TEXTS[:i] for i in range(4)), strict=True)]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    found = survey(path, tokenizer, max_length=max_length, workers=1)
    try:
        report = build_sft_dataset(path, tokenizer, max_length=max_length, on_bad_row="skip").report
    except UserError:
        assert found.count(DROPPED) == len(found.rows)
        return
    assert (found.count(CUT), found.count(DROPPED)) == (report.cut_prompts, report.dropped_too_long)


def test_a_template_that_looks_into_the_texts_is_found_out(make_tokenizer, chatml):
    roles = ("user", "assistant")
    for template, has_one in ((chatml, True), (STRIPS, True), (LOOKS_INSIDE, False)):
        assert (find_skeleton(Encoder(make_tokenizer(template)), roles, template) is not None) is has_one


def test_a_skeleton_that_is_wrong_shows_in_the_rows_that_are_done_twice(tmp_path, make_tokenizer):
    """No probe has between 60 and 2999 characters, so this template passes as one that puts texts together."""
    template = COUNTS_LETTERS.replace("> 60", "> 60 and m['content'] | length < 2000")
    tokenizer = make_tokenizer(template)
    assert find_skeleton(Encoder(tokenizer), ("user", "assistant"), template) is not None
    path = write(tmp_path / "a.jsonl", [{"input": "the quick fox " * 6, "output": "yes"}] * 40)
    dataset = build_sft_dataset(path, tokenizer)
    assert survey(path, tokenizer, workers=1).rows["tokens"].tolist() == dataset.lengths


def test_a_vocabulary_with_tokens_over_several_words_is_not_counted_by_words(plain_tokenizer, make_tokenizer):
    counter = TokenCounter(Encoder(plain_tokenizer), plain_tokenizer)
    assert counter.by_words
    other = make_tokenizer()
    other.add_tokens("quick brown")
    counter = TokenCounter(Encoder(other), other)
    assert not counter.by_words
    assert counter.count(["the quick brown fox"]) == [len(other("the quick brown fox")["input_ids"])]


def test_the_cache_may_forget(plain_tokenizer, monkeypatch):
    monkeypatch.setattr("fastpeft.data.token_counts._KEPT", 20)
    counter = TokenCounter(Encoder(plain_tokenizer), plain_tokenizer)
    for start in range(0, 200, 7):
        texts = [f"the {i} quick {i * i} fox" for i in range(start, start + 10)]
        assert counter.count(texts) == [len(ids) for ids in plain_tokenizer(texts)["input_ids"]]


def test_workers_give_what_one_process_gives(tmp_path, chat_tokenizer, monkeypatch):
    monkeypatch.setattr("fastpeft.data.parts._PART", 700)
    lines = [{"input": f"please send {i} cups", "output": "to Rome"} if i % 9 else "{broken" for i in range(120)]
    path = write(tmp_path / "a.jsonl", [*lines[:50], "", *lines[50:]])
    one, two = (survey(path, chat_tokenizer, workers=workers) for workers in (1, 2))
    assert np.array_equal(one.rows, two.rows)
    assert one.complaints == two.complaints and one.bad == two.bad == 14
    assert one.complaints[0].startswith(f"{path}:1: not valid JSON")
    assert one.complaints[-1].startswith(f"{path}:119: ")  # the blank line counts
    assert one.lines == 121 and one.rows["line"][-1] == 121


def test_a_sample_is_spread_and_keeps_its_line_numbers(tmp_path, plain_tokenizer, monkeypatch):
    monkeypatch.setattr("fastpeft.data.parts._PART", 700)
    path = write(tmp_path / "a.jsonl", [{"input": "a", "output": "b" * i} for i in range(300)])
    found = survey(path, plain_tokenizer, sample=30, workers=1)
    assert found.rows["line"].tolist() == list(range(1, 301, 10)) and found.stride == 10


def test_duplicates_and_overlap_are_named(tmp_path, plain_tokenizer):
    rows = [{"input": "a", "output": "1"}, {"input": "b", "output": "2"}, {"prompt": " a", "completion": "1"}]
    train = survey(write(tmp_path / "t.jsonl", rows), plain_tokenizer, workers=1, name="t.jsonl")
    held = survey(write(tmp_path / "v.jsonl", [{"input": "c", "output": "2"}, {"input": "b", "output": "x"}]),
                  plain_tokenizer, workers=1, name="v.jsonl")  # fmt: skip
    assert train.duplicates() == (1, ["t.jsonl:3 (as line 1)"])
    assert held.overlap(train) == (1, ["v.jsonl:2"])


def test_preferences_and_prompts_are_counted_as_training_does(tmp_path, tokenizer):
    pairs = [{"prompt": one or "a", "chosen": f"{other} yes", "rejected": "no way"}
             for one in ODD_TEXTS[:8] for other in ODD_TEXTS[:6]]  # fmt: skip
    pairs += [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": " ", "rejected": "b"}]
    path = write(tmp_path / "p.jsonl", pairs)
    for limit in (24, 4096):
        found = survey(path, tokenizer, kind="preference", max_length=limit, workers=1)
        report = build_preference_dataset(path, tokenizer, max_length=limit, on_bad_row="skip").report
        assert (found.count(CUT), found.count(DROPPED)) == (report.cut_prompts, report.dropped_too_long)
        assert found.bad == len(report.complaints) == 1
    prompts = write(tmp_path / "q.jsonl", [{"prompt": text} for text in ODD_TEXTS])
    found = survey(prompts, tokenizer, kind="prompt", max_length=4096, workers=1)
    dataset = build_prompt_dataset(prompts, tokenizer, max_length=4096, on_bad_row="skip")
    assert found.rows["tokens"].tolist() == [len(item["input_ids"]) for item in dataset]
    assert found.bad == len(dataset.report.complaints)


def test_bad_arguments(tmp_path, plain_tokenizer):
    with pytest.raises(UserError, match="no such file"):
        survey(tmp_path / "x.jsonl", plain_tokenizer)
    with pytest.raises(UserError, match="it is empty"):
        survey(write(tmp_path / "a.jsonl", []), plain_tokenizer)
    with pytest.raises(UserError, match="sample is 0"):
        survey(write(tmp_path / "a.jsonl", [{}]), plain_tokenizer, sample=0)
