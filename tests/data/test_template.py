"""Rows with columns of their own: the same tokens as rows written out, wherever rows are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpeft.data import RowTemplate, build_sft_dataset, cached_sft_dataset, read_records
from fastpeft.data.records import read_prompt_rows
from fastpeft.data.survey import survey
from fastpeft.errors import UserError

TEMPLATE = RowTemplate('From: {place} {{"a": 1}} { b }\nQuestion: {question}', "{answer}")
ROWS = [  # braces in values, and in the template around what is no name, are text
    {"place": f"{{question}} {i}", "question": f"two cups to Rome {i}?", "answer": f"sent {i}", "id": i}
    for i in range(60)
]
WRITTEN = [
    {"prompt": f'From: {row["place"]} {{{{"a": 1}}}} {{ b }}\nQuestion: {row["question"]}', "completion": row["answer"]}
    for row in ROWS
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat template"])
def test_the_tokens_are_those_of_rows_written_out(
    chat: bool, tmp_path: Path, make_tokenizer: Callable[..., Any], chatml: str
) -> None:
    tokenizer = make_tokenizer(chatml if chat else None)
    expected = list(build_sft_dataset(WRITTEN, tokenizer))
    file = write(tmp_path / "rows.jsonl", ROWS)
    rows = build_sft_dataset(file, tokenizer, template=TEMPLATE)
    assert list(rows) == expected and rows.report.forms == {"template": 60}
    for _ in range(2):
        cached = cached_sft_dataset(file, tokenizer, tmp_path / "cache", template=TEMPLATE, workers=1)
        assert list(cached) == expected
    found = survey(file, tokenizer, template=TEMPLATE, workers=1)
    assert found.forms() == {"template": 60} and found.bad == 0
    assert found.rows["tokens"].tolist() == [len(row["input_ids"]) for row in expected]


def test_another_template_is_another_entry_of_the_cache(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    file, tokenizer = write(tmp_path / "rows.jsonl", [{"q": "cups?", "a": "sent"}]), make_tokenizer()
    texts = [
        tokenizer.decode(
            cached_sft_dataset(file, tokenizer, tmp_path / "cache", template=one, workers=1)[0]["input_ids"]
        )
        for one in (RowTemplate("{q}", "{a}"), RowTemplate("Q: {q}", "{a}"), RowTemplate("{q}", "A: {a}"))
    ]
    assert len(set(texts)) == 3


def test_numbers_are_written_and_other_values_refused(tmp_path: Path) -> None:
    template = RowTemplate("{a}", "{b}")
    found = read_records([{"a": 3, "b": 0.5}], template=template)
    assert [turn.content for turn in found.records[0].turns] == ["3", "0.5"]
    rows: list[Any] = [
        {"a": "x", "b": None},
        {"a": ["x"], "b": "y"},
        {"A": "x", "b": "y"},
        {"a": True, "b": "y"},
        {},
        "text",
    ]
    with pytest.raises(UserError) as refused:
        read_records(rows, template=template)
    for told in (
        "rows[0]: key 'b' is null; it must be a string",
        "rows[1]: key 'a' is a list",
        "rows[2]: no key 'a'; found 'A', 'b'; did you mean 'a' where it says 'A'?",
        "rows[3]: key 'a' is a boolean",
        "rows[4]: no key 'a' and 'b'; found nothing",
        "rows[5]: a row is a string; it must be an object with the keys 'a' and 'b'",
    ):
        assert told in str(refused.value)


def test_rows_to_generate_from_need_no_answer(tmp_path: Path) -> None:
    template = RowTemplate("{a}", "{b} {c}")
    file = write(tmp_path / "rows.jsonl", [{"a": "x"}, {"a": "y", "b": "1", "c": "2"}])
    assert read_prompt_rows(file, template) == [{"a": "x"}, {"a": "y", "b": "1", "c": "2"}]
    assert template.parse({"a": "x", "b": "1"}, "", for_prompt=True).turns[1].content == ""
    with pytest.raises(UserError, match="no key 'a'; found 'b'"):
        read_prompt_rows(write(file, [{"b": "1"}]), template)


@pytest.mark.parametrize(("prompt", "answer", "told"), [("Question:", "{a}", "prompt"), ("{q}", "", "answer")])
def test_a_text_without_a_field_is_no_template(prompt: str, answer: str, told: str) -> None:
    with pytest.raises(UserError, match=f"the template of the {told} is .*; it needs a field of a row"):
        RowTemplate(prompt, answer)
