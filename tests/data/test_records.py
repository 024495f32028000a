"""JSON Lines reading: what is accepted, and that every complaint says where and what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpeft.data import load_records, read_records
from fastpeft.data.forms import Message
from fastpeft.data.json_lines import read_text_lines
from fastpeft.data.records import read_prompt_rows
from fastpeft.errors import UserError


def write(path: Path, *lines: str | bytes | dict) -> Path:
    """A file of these lines; a dict is written as JSON."""
    data = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in data))
    return path


PROMPTS = "'input', 'prompt', 'instruction', 'messages' or 'conversations'"
GOOD = {"input": "2+2?", "output": "4"}


@pytest.mark.parametrize(
    ("row", "turns", "separator"),
    [
        pytest.param(GOOD, [("user", "2+2?"), ("assistant", "4")], " ", id="input-output"),
        pytest.param({"input": "a\n", "output": "b"}, [("user", "a\n"), ("assistant", "b")], "", id="space-in-input"),
        pytest.param({"input": "a", "output": " b"}, [("user", "a"), ("assistant", " b")], "", id="space-in-output"),
        pytest.param({"input": "", "output": "b"}, [("user", ""), ("assistant", "b")], "", id="empty-input"),
        pytest.param({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")], "", id="prompt"),
        pytest.param(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            [("user", "a"), ("assistant", "b")],
            "",
            id="messages",
        ),
        pytest.param(
            {"instruction": "a", "input": "b", "output": "c", "text": "whole"},
            [("user", "a\n\nb"), ("assistant", "c")],
            "\n\n",
            id="alpaca",
        ),
        pytest.param({"instruction": "a", "output": "c"}, [("user", "a"), ("assistant", "c")], "\n\n", id="no-input"),
        pytest.param(
            {"instruction": "a", "input": None, "output": "c"},
            [("user", "a"), ("assistant", "c")],
            "\n\n",
            id="null-input",
        ),
        pytest.param(
            {"instruction": "a", "input": " ", "output": "\nc"},
            [("user", "a"), ("assistant", "\nc")],
            "",
            id="blank-input",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": who, "value": text}
                    for who, text in [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
                ]
            },
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
            "",
            id="sharegpt",
        ),
        pytest.param({"text": "a b", "id": 3}, [("assistant", "a b")], "", id="text"),
        pytest.param({**GOOD, "text": "whole"}, [("user", "2+2?"), ("assistant", "4")], " ", id="text-beside"),
        pytest.param({**GOOD, "id": 7, "tags": None}, [("user", "2+2?"), ("assistant", "4")], " ", id="extra-keys"),
    ],
)
def test_every_form(tmp_path, row, turns, separator):
    (record,) = load_records(write(tmp_path / "a.jsonl", row))
    assert record.turns == tuple(Message(*turn) for turn in turns)
    assert record.separator == separator
    assert record.where == f"{tmp_path / 'a.jsonl'}:1"
    assert record.plain == (turns[0][0] == "assistant")


def test_blank_lines_bom_crlf_and_line_separators_inside_strings(tmp_path):
    """U+2028 is a line end to str.splitlines, not to JSON Lines; line numbers count blank lines."""
    path = write(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r",
        "",
        '{"input": "one\u2028two", "output": "Zoë"}',
        "   ",
    )
    first, second = load_records(path)
    assert first.turns[0].content == "2+2?"
    assert second.turns[0].content == "one\u2028two"
    assert second.turns[1].content == "Zoë"
    assert second.where.endswith("a.jsonl:3")


def test_last_line_without_newline(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    assert len(load_records(tmp_path / "a.jsonl")) == 2


def test_limit_stops_reading(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, GOOD, "{broken")
    assert len(load_records(path, limit=2)) == 2
    with pytest.raises(UserError, match="limit is 0"):
        load_records(path, limit=0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        pytest.param(
            {"inptu": "a", "output_text": "b"},
            ["no keys 'input' and 'output'", "found 'inptu', 'output_text'", "'input' where it says 'inptu'"],
            id="both-misspelt",
        ),
        pytest.param(
            {"input": "a", "ouput": "b"},
            ["no key 'output'", "found 'input', 'ouput'", "did you mean 'output' where it says 'ouput'?"],
            id="one-misspelt",
        ),
        pytest.param({"Input": "a", "Output": "b"}, ["'input' where it says 'Input'"], id="case"),
        pytest.param({"prompt": "a"}, ["no key 'completion'", "found 'prompt'"], id="one-absent"),
        pytest.param({"x": 1, "y": 2}, ["no key of a known form", "found 'x', 'y'", "'messages'"], id="unknown-keys"),
        pytest.param("{}", ["the object is empty"], id="empty-object"),
        pytest.param({"input": "a", "output": None}, ["key 'output' is null", "must be a string"], id="null"),
        pytest.param({"input": "a", "output": 42}, ["key 'output' is a number (42)"], id="number"),
        pytest.param({"input": "a", "output": True}, ["key 'output' is a boolean (true)"], id="boolean"),
        pytest.param({"input": "a", "output": {"k": 1}}, ["is an object", "as a JSON string"], id="object"),
        pytest.param('"text"', ["the line is a string", "must be an object"], id="not-an-object"),
        pytest.param('{"input": "a", "input": "b", "output": "c"}', ["key 'input' stands 2 times"], id="duplicate"),
        pytest.param({**GOOD, "prompt": "a", "completion": "b"}, ["keep the keys of one form"], id="two-forms"),
        pytest.param('{"input": "a" "output": "b"}', ["not valid JSON", "column 15", '{"input": "a"  -->'], id="comma"),
        pytest.param('{"input": "a", "output": "b"', ["not valid JSON", "column 29"], id="cut-off"),
        pytest.param(b'{"input": "caf\xe9", "output": "b"}', ["byte 0xe9 at position 15 is not UTF-8"], id="latin-1"),
        pytest.param('{"input": "\\ud83d", "output": "b"}', ["'input' has half of a surrogate pair"], id="surrogate"),
        pytest.param("[" * 100_000 + "]" * 100_000, ["not valid JSON"], id="deep"),
        pytest.param({"messages": []}, ["'messages' is an empty list"], id="no-messages"),
        pytest.param({"messages": "hi"}, ["'messages' is a string", "must be a list"], id="messages-text"),
        pytest.param(
            {"messages": [{"from": "user", "value": "a"}]},
            ["messages[0]: no key 'role' and 'content'; found 'from', 'value'"],
            id="sharegpt-turn",
        ),
        pytest.param(
            {"messages": [{"rol": "user", "content": "a"}]},
            ["messages[0]: no key 'role'", "'role' where it says 'rol'"],
            id="misspelt-role-key",
        ),
        pytest.param(
            {"messages": [{"role": "asistant", "content": "a"}]},
            ["messages[0]: role is 'asistant'; did you mean 'assistant'?"],
            id="misspelt-role",
        ),
        pytest.param(
            {"messages": [{"role": "bot", "content": "a"}]}, ["it must be one of system, "], id="unknown-role"
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": None}]},
            ["messages[0]: key 'content' is null"],
            id="null-content",
        ),
        pytest.param({"messages": ["hello"]}, ["messages[0]: it is a string"], id="turn-is-text"),
        pytest.param(
            {"messages": [{"role": "user", "content": "a"}]}, ["ends with the assistant's"], id="no-answer"
        ),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_file_line_and_reason(tmp_path, line, words):
    path = write(tmp_path / "train.jsonl", GOOD, GOOD, line)
    with pytest.raises(UserError) as caught:
        load_records(path)
    for word in [f"{path}:3: ", *words]:
        assert word in str(caught.value)


def test_the_first_ten_bad_rows_are_listed_and_the_rest_counted(tmp_path):
    path = write(tmp_path / "train.jsonl", GOOD, *[{"input": "a"}] * 13)
    with pytest.raises(UserError) as caught:
        load_records(path)
    message = str(caught.value)
    assert "13 of 14 rows cannot be used" in message
    assert "train.jsonl:11: " in message and "train.jsonl:12: " not in message
    assert "... and 3 more" in message
    assert "on_bad_row: skip" in message


def test_skip_leaves_bad_rows_out_and_keeps_their_complaints(tmp_path):
    found = read_records(write(tmp_path / "a.jsonl", GOOD, "{", {"input": "x"}), on_bad_row="skip")
    assert len(found.records) == 1
    assert [complaint.split(": ")[0] for complaint in found.complaints] == [
        f"{tmp_path / 'a.jsonl'}:2",
        f"{tmp_path / 'a.jsonl'}:3",
    ]


def test_skip_with_nothing_left_says_why(tmp_path):
    with pytest.raises(UserError, match=r"2 of 2 rows cannot be used\n.*a\.jsonl:1: no key 'output'"):
        load_records(write(tmp_path / "a.jsonl", {"input": "x"}, {"input": "y"}), on_bad_row="skip")


def test_unknown_policy():
    with pytest.raises(UserError, match="on_bad_row is 'ignore'; it must be 'error' or 'skip'"):
        read_records([GOOD], on_bad_row="ignore")


def test_missing_file_names_the_near_ones(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file; did you mean .*train\.jsonl"):
        load_records(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="nor is there a folder"):
        load_records(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_is_refused_and_its_files_are_named(tmp_path):
    write(tmp_path / "part1.jsonl", GOOD)
    with pytest.raises(UserError, match=r"is a folder; .* it holds part1\.jsonl"):
        load_records(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xef\xbb\xbf"], ids=["no-bytes", "blank-lines", "only-bom"])
def test_an_empty_file(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl: it is empty"):
        load_records(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"\x1f\x8b\x08\x00", "compressed with gzip", id="gzip"),
        pytest.param(b"PAR1\x15\x04", "Parquet", id="parquet"),
        pytest.param("{}".encode("utf-16"), "UTF-16", id="utf-16"),
        pytest.param(b'[\n{"input": "a", "output": "b"}\n]', "a JSON list", id="json-list"),
        pytest.param(b'{\n"input": "a",\n"output": "b"\n}', "several lines", id="pretty-printed"),
    ],
)
def test_another_kind_of_file_is_called_by_its_name(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_records(tmp_path / "a.jsonl")


def test_rows_in_memory_are_named_by_index():
    with pytest.raises(UserError, match=r"^train\[1\]: no key 'output'"):
        read_records([GOOD, {"input": "a"}], name="train")
    assert len(read_records(row for row in [GOOD, GOOD]).records) == 2


@pytest.mark.parametrize("source", [GOOD, 7, b"train.jsonl"], ids=["one-row", "number", "bytes"])
def test_a_source_that_is_neither_path_nor_rows(source):
    with pytest.raises(UserError, match="give the path of a JSONL file or a list of rows"):
        read_records(source)


def test_empty_list():
    with pytest.raises(UserError, match=r"^rows: it is empty"):
        read_records([])


def test_prompt_rows_need_no_answer_and_keep_their_other_keys(tmp_path):
    rows = [{"input": "a", "id": 7}, GOOD, {"messages": [{"role": "user", "content": "b"}]}, {"instruction": "a"},
            {"instruction": "a", "input": "b"}, {"conversations": [{"from": "human", "value": "c"}]}]  # fmt: skip
    assert (
        read_prompt_rows(write(tmp_path / "p.jsonl", b"\xef\xbb\xbf" + json.dumps(rows[0]).encode(), *rows[1:])) == rows
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            {"inptu": "a"},
            "no key PROMPTS; found 'inptu'; did you mean 'input' where it says 'inptu'?",
        ),
        ({"text": "a"}, "no key PROMPTS; found 'text'"),
        (
            {},
            "the object is empty; it needs one of the keys PROMPTS",
        ),
        (
            "[1]",
            "the line is a list; it must be an object with one of the keys PROMPTS",
        ),
        ({"prompt": 7}, "key 'prompt' is a number (7); it must be a string"),
    ],
    ids=["misspelt", "another-key", "empty", "a-list", "a-number"],
)
def test_a_bad_prompt_row_is_told_of_prompts_alone(tmp_path, line, words):
    """A misspelt 'input' in a row to generate from was answered with a demand for 'output', by a function's name."""
    file = write(tmp_path / "p.jsonl", GOOD, line)
    with pytest.raises(UserError) as caught:
        read_prompt_rows(file)
    assert str(caught.value) == f"{file}:2: {words}".replace("PROMPTS", PROMPTS)


def test_several_bad_prompt_rows_are_listed_without_training_advice(tmp_path):
    file = write(tmp_path / "p.jsonl", GOOD, {"x": 1}, {"y": 1})
    with pytest.raises(UserError) as caught:
        read_prompt_rows(file)
    first, second, third = str(caught.value).splitlines()
    assert first == f"{file}: 2 of 3 rows cannot be used"
    assert second.startswith(f"{file}:2: no key") and third.startswith(f"{file}:3: no key")


def test_text_lines(tmp_path):
    file = write(tmp_path / "p.txt", b"\xef\xbb\xbf[one]", "", "  two\u2028three \r", "{")
    assert read_text_lines(file) == ["[one]", "two\u2028three", "{"]
    with pytest.raises(UserError, match=r"p\.txt:2: byte 0xe9 at position 4 is not UTF-8"):
        read_text_lines(write(file, "good", "caf\u00e9".encode("latin-1")))
    with pytest.raises(UserError, match=r"p\.txt is UTF-16 text; save it as UTF-8"):
        read_text_lines(write(file, "good".encode("utf-16")))
    with pytest.raises(UserError, match=r"x\.txt: no such file"):
        read_text_lines(tmp_path / "x.txt")
