"""Rows of compared answers: the forms that are read, and what is said of those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpeft.data import build_preference_dataset, parse_comparison
from fastpeft.data.forms import Message
from fastpeft.data.row_values import RowError
from fastpeft.errors import UserError

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: help\n\nAssistant: "


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_pair() -> None:
    found = parse_comparison({**PAIR, "margin": 2}, "f:1")
    assert found.prompt == (Message("user", "p"),)
    assert (found.responses, found.pairs, found.margins) == (("a", "b"), ((0, 1),), (2.0,))


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": HH + "gladly", "rejected": HH + "no"},
        {
            "chosen": [
                turn("user", "hi"),
                turn("assistant", "yes?"),
                turn("user", "help"),
                turn("assistant", "gladly"),
            ],
            "rejected": [turn("user", "hi"), turn("assistant", "yes?"), turn("user", "help"), turn("assistant", "no")],
        },
        {
            "prompt": [turn("user", "hi"), turn("assistant", "yes?"), turn("user", "help")],
            "chosen": "gladly",
            "rejected": [turn("assistant", "no")],
        },
    ],
    ids=["text", "messages", "prompt-of-messages"],
)
def test_two_whole_dialogues(row: dict[str, Any]) -> None:
    found = parse_comparison(row, "f:1")
    assert [message.role for message in found.prompt] == ["user", "assistant", "user"]
    assert found.prompt[-1].content == "help" and found.responses == ("gladly", "no")


def test_texts_that_begin_alike_share_whole_words() -> None:
    found = parse_comparison({"chosen": "one two three", "rejected": "one two thirty"}, "f:1")
    assert found.prompt[0].content == "one two " and found.responses == ("three", "thirty")


def test_a_ranking_gives_all_pairs_but_ties() -> None:
    """Places 2, 1, 2: the second beats the other two, which are tied."""
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 1, 2]}
    found = parse_comparison(row, "f:1")
    assert (found.pairs, found.tied) == (((1, 0), (1, 2)), 1)
    by_score = parse_comparison({"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.5, 3, -1]}, "f:1")
    assert by_score.pairs == ((1, 0), (0, 2), (1, 2))
    equal = parse_comparison({"prompt": "p", "responses": ["a", "a"], "ranking": [1, 2]}, "f:1")
    assert (equal.pairs, equal.equal) == ((), 1)


RANKED = {"prompt": "p", "responses": ["a", "b"]}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p", "chosen": "a"}, "no key 'rejected'; found 'prompt', 'chosen'"),
        ({"prompt": "p", "choosen": "a", "rejected": "b"}, "did you mean 'chosen' where it says 'choosen'"),
        ({**PAIR, "chosen": ""}, "key 'chosen' is empty"),
        ({**PAIR, "rejected": " \n"}, "key 'rejected' is empty"),
        ({**PAIR, "chosen": 7}, "key 'chosen' is a number (7); it must be a string"),
        ({**PAIR, "margin": "much"}, "key 'margin' is a string"),
        ({**PAIR, "prompt": []}, "key 'prompt' is an empty list"),
        ({"chosen": "x", "rejected": "y"}, "do not begin alike"),
        ({"chosen": HH + "a", "rejected": "\n\nHuman: other\n\nAssistant: b"}, "differ before their last answers"),
        (RANKED, "no key for the order"),
        ({**RANKED, "ranking": [1]}, "a list of 1; it must be a list with a number for each of the 2 responses"),
        ({**RANKED, "ranking": [1, None]}, "ranking[1] is null"),
        ({**RANKED, "ranking": [0, 1]}, "1 for the best"),
        ({**RANKED, "scores": [1.0, float("nan")]}, "scores[1] is a number (nan); it must be a finite number"),
        ({**RANKED, "ranking": [1, 2], "scores": [1, 2]}, "'ranking' and 'scores'"),
        ({**RANKED, "responses": ["a", ""], "ranking": [1, 2]}, "responses[1] is empty"),
        ({**RANKED, "responses": ["a"], "ranking": [1]}, "two answers or more"),
    ],
)
def test_complaints(row: dict[str, Any], told: str) -> None:
    with pytest.raises(RowError) as error:
        parse_comparison(row, "f:1")
    assert told in str(error.value)


def test_complaints_name_file_and_line(tmp_path: Path, plain_tokenizer: Any) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [PAIR, {**PAIR, "chosen": ""}, "[1]", {**PAIR, "rejected": "a"}]
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        build_preference_dataset(file, plain_tokenizer)
    assert f"{file}:2: key 'chosen' is empty" in str(error.value)
    assert f"{file}:3: the line is a list; it must be an object with the keys 'chosen'" in str(error.value)
    found = build_preference_dataset(file, plain_tokenizer, on_bad_row="skip")
    assert (len(found), found.report.rows, len(found.report.complaints)) == (1, 4, 2)
    assert f"1 with equal answers, of which no pair was made: {file}:4" in found.report.summary()
