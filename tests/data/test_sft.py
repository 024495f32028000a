"""Records to tokens: which tokens are read, which are targets, what is cut, and what the report says."""

from __future__ import annotations

import json
import pickle

import pytest

from fastpeft.data import IGNORE_INDEX, build_sft_dataset, encode_prompt, load_records, stop_token_ids
from fastpeft.errors import UserError

ROW = {"input": "the quick fox", "output": "jumps over"}
DIALOGUE = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "over the dog"},
    {"role": "assistant", "content": "lazy"},
]


def read(item, tokenizer):
    """The text a model reads and the pieces it is taught, each run of targets decoded."""
    pieces, run = [], []
    for token, label in zip(item["input_ids"], item["labels"], strict=True):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            run.append(token)
        elif run:
            pieces.append(tokenizer.decode(run))
            run = []
    return tokenizer.decode(item["input_ids"]), [*pieces, *([tokenizer.decode(run)] if run else [])]


def prompt_of(item):
    return item["input_ids"][: next(i for i, label in enumerate(item["labels"]) if label != IGNORE_INDEX)]


def test_without_a_template_the_row_is_input_space_output_eos(plain_tokenizer):
    (item,) = build_sft_dataset([ROW], plain_tokenizer)
    assert read(item, plain_tokenizer) == ("the quick fox jumps over</s>", [" jumps over</s>"])


def test_prompt_and_completion_are_joined_as_they_are(plain_tokenizer):
    (item,) = build_sft_dataset([{"prompt": "the quick", "completion": "fox"}], plain_tokenizer)
    assert read(item, plain_tokenizer) == ("the quickfox</s>", ["fox</s>"])


def test_bos_comes_first_where_the_tokenizer_puts_one(bos_tokenizer):
    (item,) = build_sft_dataset([ROW], bos_tokenizer)
    assert read(item, bos_tokenizer)[0] == "<s>the quick fox jumps over</s>"
    assert item["input_ids"].count(bos_tokenizer.bos_token_id) == 1


def test_with_a_template_the_end_of_turn_token_is_the_last_target(chat_tokenizer):
    """The template writes a newline after <|end|>; it is neither a target nor kept."""
    (item,) = build_sft_dataset([ROW], chat_tokenizer)
    text = "<|start|>user\nthe quick fox<|end|>\n<|start|>assistant\njumps over<|end|>"
    assert read(item, chat_tokenizer) == (text, ["jumps over<|end|>"])


def test_every_assistant_turn_is_a_target(chat_tokenizer):
    (item,) = build_sft_dataset([{"messages": DIALOGUE}], chat_tokenizer)
    whole = chat_tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert read(item, chat_tokenizer) == (whole.rstrip("\n"), ["jumps<|end|>", "lazy<|end|>"])


def test_a_dialogue_needs_a_template(plain_tokenizer):
    with pytest.raises(UserError, match=r"rows\[0\]: a dialogue .* needs a chat template"):
        build_sft_dataset([{"messages": DIALOGUE}], plain_tokenizer)
    (item,) = build_sft_dataset([{"messages": DIALOGUE[1:3]}], plain_tokenizer)
    assert read(item, plain_tokenizer)[0] == "the quick foxjumps</s>"


def test_a_template_without_end_of_turn_token_gets_the_tokenizers_eos(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
                                "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")  # fmt: skip
    (item,) = build_sft_dataset([{"messages": DIALOGUE}], tokenizer)
    text, targets = read(item, tokenizer)
    assert text.endswith("user: over the dog\nassistant: lazy</s>")
    assert targets == ["jumps", "lazy</s>"]


def test_a_text_appended_to_the_last_turn_only_does_not_spoil_a_dialogue(make_tokenizer, chatml):
    """Phi-3's template closes the whole dialogue with EOS, so no rendering is the beginning of the next one."""
    tokenizer = make_tokenizer(chatml + "{% if not add_generation_prompt %}{{ '</s>' }}{% endif %}")
    (item,) = build_sft_dataset([{"messages": DIALOGUE}], tokenizer)
    assert read(item, tokenizer)[1] == ["jumps<|end|>", "lazy<|end|>"]


def test_an_answer_that_looks_like_template_text_is_found(make_tokenizer, chatml):
    (item,) = build_sft_dataset([{"input": "a", "output": "end"}], tokenizer := make_tokenizer(chatml))
    assert read(item, tokenizer)[1] == ["end<|end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    """Some templates drop the thoughts of earlier answers; here they are shouted."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m['role'] + ':' }}"
        "{{ m['content'] | upper if m['role'] == 'assistant' and not loop.last else m['content'] }}{{ '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    reason = r"rows\[0\]: the chat template writes an earlier assistant turn differently once turn 3 follows"
    with pytest.raises(UserError, match=reason) as caught:
        build_sft_dataset([{"messages": DIALOGUE[1:]}], tokenizer)
    assert "jumps" in str(caught.value) and "JUMPS" in str(caught.value)


def test_a_generation_prompt_that_is_not_in_the_rendered_answer_is_refused(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chatml.replace("assistant\n'", "assistant\n<think>'"))
    with pytest.raises(UserError, match="generation prompt is not how it begins the answer") as caught:
        build_sft_dataset([ROW], tokenizer)
    assert "<think>" in str(caught.value)


def test_a_row_the_template_refuses_is_a_bad_row(make_tokenizer, chatml):
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') if messages | length > 2 }}" + chatml)
    rows = [ROW, {"messages": DIALOGUE}]
    with pytest.raises(UserError, match=r"rows\[1\]: the chat template refuses .*roles must alternate"):
        build_sft_dataset(rows, tokenizer)
    data = build_sft_dataset(rows, tokenizer, on_bad_row="skip")
    assert len(data) == data.report.kept == 1
    assert data.report.bad_rows == 1
    assert "1 bad, left out: rows[1]: the chat template refuses" in data.report.summary()


def test_no_template_and_no_eos_is_refused(plain_tokenizer, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        build_sft_dataset([ROW], tokenizer)
    with pytest.raises(UserError, match="no EOS token"):
        stop_token_ids(tokenizer)


@pytest.mark.parametrize("kind", ["plain", "bos", "chat"])
def test_generation_starts_from_the_tokens_training_saw(kind, request):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    for row in (ROW, {"prompt": "the lazy", "completion": "dog"}, {"messages": DIALOGUE[1:3]}):
        (item,) = build_sft_dataset([row], tokenizer)
        assert encode_prompt(row, tokenizer) == prompt_of(item)


def test_prompts_of_every_form(chat_tokenizer, tmp_path):
    wanted = encode_prompt("the quick fox", chat_tokenizer)
    assert chat_tokenizer.decode(wanted) == "<|start|>user\nthe quick fox<|end|>\n<|start|>assistant\n"
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW))
    same = [ROW, {"input": "the quick fox"}, DIALOGUE[1:2], DIALOGUE[1:3], *load_records(tmp_path / "a.jsonl")]
    assert all(encode_prompt(prompt, chat_tokenizer) == wanted for prompt in same)
    with pytest.raises(UserError, match=r"encode_prompt: .*messages\[0\]: no key 'role'"):
        encode_prompt([{"content": "a"}], chat_tokenizer)
    with pytest.raises(
        UserError,
        match=r"encode_prompt: no key 'input', .* or 'conversations'; found 'x'",
    ):
        encode_prompt({"x": "a"}, chat_tokenizer)


def test_a_token_over_the_boundary_is_split_so_that_the_prompt_stays_itself(make_tokenizer):
    """BPE would join 'qu' + 'ick' into one token; the prompt 'the qu' must keep the tokens it has alone."""
    tokenizer = make_tokenizer()
    row = {"prompt": "the qu", "completion": "ick fox"}
    joined = tokenizer("the quick fox")["input_ids"]
    alone = tokenizer("the qu")["input_ids"]
    assert joined[: len(alone)] != alone
    (item,) = build_sft_dataset([row], tokenizer)
    assert prompt_of(item) == alone
    assert read(item, tokenizer) == ("the quick fox</s>", ["ick fox</s>"])


def test_a_long_prompt_loses_its_beginning_and_the_answer_stays(bos_tokenizer):
    row = {"input": " ".join(["quick"] * 30) + " fox", "output": "jumps over"}
    data = build_sft_dataset([row], bos_tokenizer, max_length=12)
    assert len(data[0]["input_ids"]) == 12
    text, targets = read(data[0], bos_tokenizer)
    assert text.startswith("<s>") and text.endswith("quick fox jumps over</s>")
    assert targets == [" jumps over</s>"]
    assert data.report.cut_prompts == 1
    assert "1 too long: the beginning of the prompt was cut" in data.report.summary()


def test_a_long_user_turn_is_cut_inside_its_template(chat_tokenizer):
    row = {"input": " ".join(["quick"] * 30) + " fox", "output": "jumps over"}
    data = build_sft_dataset([row], chat_tokenizer, max_length=20)
    text, targets = read(data[0], chat_tokenizer)
    assert len(data[0]["input_ids"]) == 20
    assert text.startswith("<|start|>user\n quick") and "quick fox<|end|>\n<|start|>assistant\n" in text
    assert targets == ["jumps over<|end|>"]


def test_a_template_longer_than_the_room_is_cut_from_the_left(chat_tokenizer):
    long_system = [{"role": "system", "content": "please send two red cups " * 20}, *DIALOGUE[1:3]]
    data = build_sft_dataset([{"messages": long_system}], chat_tokenizer, max_length=10)
    text, targets = read(data[0], chat_tokenizer)
    assert len(data[0]["input_ids"]) == 10
    assert targets == ["jumps<|end|>"]
    assert text.endswith("<|start|>assistant\njumps<|end|>")


def test_a_long_dialogue_loses_its_oldest_exchanges_whole(chat_tokenizer):
    whole = build_sft_dataset([{"messages": DIALOGUE}], chat_tokenizer)
    longest = whole.report.longest
    data = build_sft_dataset([{"messages": DIALOGUE}], chat_tokenizer, max_length=longest - 1)
    text, targets = read(data[0], chat_tokenizer)
    assert text.startswith("<|start|>system\nbe brief<|end|>\n<|start|>user\nover the dog")
    assert targets == ["lazy<|end|>"]
    assert data.report.cut_prompts == 1


def test_an_answer_that_fills_the_row_is_kept_and_one_longer_is_dropped(plain_tokenizer):
    answer = plain_tokenizer(" jumps over")["input_ids"]
    size = len(answer) + 1
    data = build_sft_dataset([ROW], plain_tokenizer, max_length=size)
    assert data[0]["input_ids"] == [*answer, plain_tokenizer.eos_token_id]
    assert data[0]["labels"][0] == IGNORE_INDEX, "nothing stands before the first token to predict it from"
    longer = {"input": "the", "output": "jumps over the lazy dog and over and over"}
    data = build_sft_dataset([ROW, longer], plain_tokenizer, max_length=size)
    assert (data.report.rows, data.report.kept, data.report.dropped_too_long) == (2, 1, 1)
    assert "1 dropped: the output alone is longer than" in data.report.summary()
    with pytest.raises(UserError, match=rf"no row is left .* 1 of 1 rows .*max_length={size} .*raise max_length"):
        build_sft_dataset([longer], plain_tokenizer, max_length=size)


@pytest.mark.parametrize("max_length", range(2, 40))
@pytest.mark.parametrize("kind", ["plain", "bos", "chat"])
def test_no_length_breaks_a_row(kind, max_length, request):
    """Whatever the limit, a kept row fits it and ends with its whole answer."""
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    row = {"input": "the quick brown fox jumps over the lazy dog", "output": "two red cups"}
    whole = build_sft_dataset([row], tokenizer)[0]
    answer = [label for label in whole["labels"] if label != IGNORE_INDEX]
    try:
        data = build_sft_dataset([row], tokenizer, max_length=max_length)
    except UserError:
        assert len(answer) > max_length
        return
    assert len(data[0]["input_ids"]) == min(max_length, len(whole["input_ids"]))
    assert data[0]["input_ids"][-len(answer) :] == answer
    assert data[0]["labels"][1:][-len(answer) :] == answer[-(len(data[0]["labels"]) - 1) :]


@pytest.mark.parametrize("max_length", [1, 0, True, 5.0, None])
def test_max_length_is_checked(max_length, plain_tokenizer):
    with pytest.raises(UserError, match=r"max_length is .* whole number of 2 or more"):
        build_sft_dataset([ROW], plain_tokenizer, max_length=max_length)


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_an_empty_output_is_taught_as_eos_and_counted(kind, request):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    data = build_sft_dataset([{"input": "the fox", "output": ""}, ROW], tokenizer)
    (target,) = [label for label in data[0]["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode([target]) == {"plain": "</s>", "chat": "<|end|>"}[kind]
    assert data.report.empty_outputs == 1
    assert "1 with an empty output" in data.report.summary()


def test_a_row_with_nothing_to_learn_is_a_bad_row(plain_tokenizer):
    with pytest.raises(UserError, match=r"rows\[1\]: prompt and output are both empty"):
        build_sft_dataset([ROW, {"input": "", "output": ""}], plain_tokenizer)


def test_the_report_adds_up(plain_tokenizer):
    data = build_sft_dataset([ROW, ROW, {"input": 3, "output": "x"}], plain_tokenizer, on_bad_row="skip", name="mine")
    report = data.report
    assert (report.rows, report.kept, report.bad_rows) == (3, 2, 1)
    assert report.prompt_tokens + report.output_tokens == sum(data.lengths)
    assert report.longest == max(data.lengths) == len(data[0]["input_ids"])
    assert report.summary().startswith("mine: 2 of 3 rows, ")
    assert "mine[2]: key 'input' is a number" in report.summary()


def test_a_file_is_named_in_report_and_complaints(plain_tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({"input": "a"}) + "\n")
    with pytest.raises(UserError, match=r"train\.jsonl:2: no key 'output'"):
        build_sft_dataset(path, plain_tokenizer)
    assert str(path) in build_sft_dataset(str(path), plain_tokenizer, on_bad_row="skip").report.summary()


def test_the_data_set_is_a_sequence_that_pickles(plain_tokenizer):
    data = build_sft_dataset([ROW, {"input": "a", "output": "b"}], plain_tokenizer)
    assert len(data) == 2 and len(list(data)) == 2
    assert data[-1] == data[1]
    for index in (2, -3):
        with pytest.raises(IndexError, match="data set of 2 rows"):
            data[index]
    again = pickle.loads(pickle.dumps(data))
    assert list(again) == list(data)
    assert again.report == data.report


def test_more_rows_than_one_tokenizer_call_takes(plain_tokenizer):
    rows = [{"input": f"fox {i}", "output": f"dog {i}"} for i in range(1100)]
    data = build_sft_dataset(rows, plain_tokenizer)
    assert read(data[1099], plain_tokenizer)[0] == "fox 1099 dog 1099</s>"


def test_generation_stops_where_answers_end(plain_tokenizer, chat_tokenizer, make_tokenizer):
    eos, end = plain_tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"])
    assert stop_token_ids(plain_tokenizer) == [eos]
    assert stop_token_ids(chat_tokenizer) == sorted([eos, end])
    assert stop_token_ids(make_tokenizer("{{ raise_exception('no') }}")) == [eos]


def test_smollm2s_own_template(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    data = build_sft_dataset([ROW, {"messages": DIALOGUE}], tokenizer)
    text, targets = read(data[0], tokenizer)
    assert text.startswith("<|im_start|>system\nYou are") and targets == ["jumps over<|im_end|>"]
    assert data[0]["labels"][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert data[0]["labels"][-1] in stop_token_ids(tokenizer), "transformers 5.17 takes <|im_start|> for EOS"
    assert encode_prompt(ROW, tokenizer) == prompt_of(data[0])
    assert read(data[1], tokenizer)[1] == ["jumps<|im_end|>", "lazy<|im_end|>"]
