"""Plain text, Alpaca and ShareGPT rows all the way: tokens, loss, reports, cache, survey, packing, split, prompts."""

from __future__ import annotations

import json

import pytest

from fastpeft.data import (
    IGNORE_INDEX,
    MixedDataset,
    PackedDataset,
    build_prompt_dataset,
    build_sft_dataset,
    cached_sft_dataset,
    encode_prompt,
    leaks,
    load_records,
    split_dataset,
)
from fastpeft.data.survey import CUT, DROPPED, survey
from fastpeft.errors import UserError

TEXT = {"text": "the quick fox jumps"}
ALPACA = {"instruction": "please send", "input": "two cups", "output": "to Rome"}
SHAREGPT = {"conversations": [{"from": "human", "value": "the fox"}, {"from": "gpt", "value": "jumps"}]}
LONG = {"conversations": [{"from": who, "value": text} for who, text in
                          [("system", "be brief"), ("human", "the fox"), ("gpt", "jumps"), ("human", "and"),
                           ("gpt", "over")]]}  # fmt: skip


def learnt(item, tokenizer):
    """The text of a row, and that of its tokens that carry loss."""
    targets = [label for label in item["labels"] if label != IGNORE_INDEX]
    return tokenizer.decode(item["input_ids"]), tokenizer.decode(targets)


def rows_of_all_forms(count):
    """Different rows, of all the forms by turns."""
    rows = []
    for i in range(count):
        rows.append([
            {"text": f"the quick fox {i} jumps over " + "dog " * (i % 7)},
            {"instruction": f"send {i} cups", "input": f"of {i % 5}", "output": f"to Rome {i}"},
            {"instruction": f"jump {i}", "output": "over"},
            {"conversations": [{"from": "human", "value": f"fox {i}"}, {"from": "gpt", "value": f"dog {i}"}]},
            {"input": f"number {i}", "output": f"{i}"},
        ][i % 5])  # fmt: skip
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["plain", "bos", "chat"])
def test_a_text_is_learnt_whole_and_knows_no_template(kind, request):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    (item,) = build_sft_dataset([TEXT], tokenizer)
    bos = "<s>" if kind == "bos" else ""
    text, _ = learnt(item, tokenizer)
    assert text == f"{bos}the quick fox jumps</s>"
    # Nothing stands before the first token to predict it from; every other token carries loss.
    assert item["labels"] == [IGNORE_INDEX, *item["input_ids"][1:]]


def test_a_text_has_bos_where_the_template_would_have_written_it(make_tokenizer, chatml):
    (item,) = build_sft_dataset([TEXT], tokenizer := make_tokenizer("<s>" + chatml, add_bos=True))
    assert item["input_ids"][0] == tokenizer.bos_token_id
    assert item["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_text_that_is_too_long_is_dropped_and_counted(plain_tokenizer):
    long = {"text": "the quick fox jumps over the dog " * 9}
    data = build_sft_dataset([TEXT, long], plain_tokenizer, max_length=20)
    assert (data.report.kept, data.report.dropped_too_long) == (1, 1)


def test_a_text_needs_an_end_token(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        build_sft_dataset([TEXT], tokenizer)


def test_alpaca_rows_with_and_without_a_template(plain_tokenizer, chat_tokenizer):
    (item,) = build_sft_dataset([ALPACA], plain_tokenizer)
    assert learnt(item, plain_tokenizer) == ("please send\n\ntwo cups\n\nto Rome</s>", "\n\nto Rome</s>")
    (item,) = build_sft_dataset([ALPACA], chat_tokenizer)
    asked = "<|start|>user\nplease send\n\ntwo cups<|end|>\n<|start|>assistant\n"
    assert learnt(item, chat_tokenizer) == (f"{asked}to Rome<|end|>", "to Rome<|end|>")


def test_sharegpt_rows_are_dialogues(plain_tokenizer, chat_tokenizer):
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    same = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in LONG["conversations"]]
    data = build_sft_dataset([LONG, {"messages": same}], chat_tokenizer)
    assert data[0] == data[1]
    assert learnt(data[0], chat_tokenizer)[1] == "jumps<|end|>over<|end|>"
    (item,) = build_sft_dataset([SHAREGPT], plain_tokenizer)
    assert learnt(item, plain_tokenizer) == ("the foxjumps</s>", "jumps</s>")
    with pytest.raises(UserError, match=r"rows\[0\]: a dialogue .* needs a chat template"):
        build_sft_dataset([LONG], plain_tokenizer)


def test_smollm2s_own_template(smollm2_tokenizer):
    data = build_sft_dataset([TEXT, ALPACA, SHAREGPT], smollm2_tokenizer)
    assert "<|im_start|>" not in smollm2_tokenizer.decode(data[0]["input_ids"][:-1])
    assert [learnt(item, smollm2_tokenizer)[1] for item in list(data)[1:]] == ["to Rome<|im_end|>", "jumps<|im_end|>"]


@pytest.mark.parametrize("kind", ["plain", "bos", "chat"])
def test_generation_starts_from_the_tokens_training_saw(kind, request):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    bare = [{"instruction": "please send", "input": "two cups"}, {"conversations": SHAREGPT["conversations"][:1]}]
    for row, unanswered in zip([ALPACA, SHAREGPT], bare, strict=True):
        (item,) = build_sft_dataset([row], tokenizer)
        begin = next(i for i, label in enumerate(item["labels"]) if label != IGNORE_INDEX)
        assert encode_prompt(row, tokenizer) == encode_prompt(unanswered, tokenizer) == item["input_ids"][:begin]


def test_a_text_is_no_prompt(plain_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no key 'input', .* found 'text'"):
        encode_prompt(TEXT, plain_tokenizer)
    (record,) = load_records(write(tmp_path / "a.jsonl", [TEXT]))
    with pytest.raises(UserError, match=r"a\.jsonl:1: a row of plain text has no prompt"):
        encode_prompt(record, plain_tokenizer)


def test_rewards_are_given_the_prompt_and_the_other_keys(chat_tokenizer):
    asked, dialogue = build_prompt_dataset([{**ALPACA, "id": 7}, {**SHAREGPT, "id": 8}], chat_tokenizer)
    assert asked["prompt"] == "please send\n\ntwo cups" and asked["columns"] == {"output": "to Rome", "id": 7}
    assert dialogue["prompt"][0] == {"role": "user", "content": "the fox"} and dialogue["columns"] == {"id": 8}
    assert asked["input_ids"] == encode_prompt(ALPACA, chat_tokenizer)


def test_the_report_names_the_forms(plain_tokenizer):
    assert build_sft_dataset([ALPACA], plain_tokenizer).report.summary().endswith("; form: Alpaca")
    report = build_sft_dataset([TEXT, ALPACA, SHAREGPT, TEXT], plain_tokenizer).report
    assert report.forms == {"text": 2, "Alpaca": 1, "ShareGPT": 1}
    assert report.summary().endswith("; forms: text 2, Alpaca 1, ShareGPT 1")


@pytest.mark.parametrize("kind", ["plain", "bos", "chat"])
def test_cache_and_survey_have_the_numbers_of_training(kind, request, tmp_path, monkeypatch):
    monkeypatch.setattr("fastpeft.data.parts._PART", 900)  # several parts, whose counts are added up
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    path = write(tmp_path / "a.jsonl", rows_of_all_forms(100))
    for limit in (12, 18, 400):
        plain = build_sft_dataset(path, tokenizer, max_length=limit)
        cached = cached_sft_dataset(path, tokenizer, tmp_path / "cache", max_length=limit, workers=1)
        assert list(cached) == list(plain) and vars(cached.report) == vars(plain.report)
        assert [cached.prompt_of(i) for i in range(len(plain))] == [plain.prompt_of(i) for i in range(len(plain))]
        found = survey(path, tokenizer, max_length=limit, workers=1)
        report = plain.report
        assert (found.count(CUT), found.count(DROPPED)) == (report.cut_prompts, report.dropped_too_long)
    assert found.rows["tokens"].tolist() == plain.lengths
    assert found.forms() == plain.report.forms
    assert found.forms() == {"text": 20, "Alpaca": 40, "ShareGPT": 20, "input/output": 20}


def test_texts_are_told_apart_by_all_of_them(tmp_path, plain_tokenizer):
    """A text has no prompt; by its prompt every text would be a leak of every other."""
    train = write(tmp_path / "t.jsonl", [{"text": "the fox"}, {"text": "the dog"}, {"text": "the fox"}])
    held = write(tmp_path / "v.jsonl", [{"text": "the cup"}, {"text": "the dog"}])
    one, other = (survey(path, plain_tokenizer, workers=1, name=path.name) for path in (train, held))
    assert one.duplicates() == (1, ["t.jsonl:3 (as line 1)"])
    assert other.overlap(one) == (1, ["v.jsonl:2"])


@pytest.mark.parametrize("kind", ["plain", "bos", "chat"])
def test_texts_are_held_out_and_looked_for_one_by_one(kind, request):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    data = build_sft_dataset([{"text": f"the fox {i}"} for i in range(50)], tokenizer)
    split = split_dataset(data, 0.2)
    assert (len(split.train), len(split.held_out)) == (40, 10)
    assert leaks(split.train, split.held_out) == []
    mixed = MixedDataset([split.train, split.held_out.select([3])])
    assert leaks(mixed, split.held_out) == [3]


def test_rows_of_all_forms_are_held_out_without_a_shared_prompt(chat_tokenizer):
    split = split_dataset(build_sft_dataset(rows_of_all_forms(100) * 2, chat_tokenizer), 0.2)
    assert len(split.held_out) == 40 == split.kept_together
    assert leaks(split.train, split.held_out) == []


def test_packed_texts_lose_nothing_but_their_first_tokens(plain_tokenizer):
    rows = build_sft_dataset(rows_of_all_forms(60), plain_tokenizer)
    packed = PackedDataset(rows, rows.lengths, 64)
    assert sum(packed.lengths) == sum(rows.lengths)
    count = sum(label != IGNORE_INDEX for item in packed for label in item["labels"])
    assert count == rows.report.output_tokens
