"""Mangled data files, each with the whole message that a person gets.

FILE stands for the path, KEYS for the keys of training rows, SKIP for the advice to leave one bad row out,
ALONE for the beginning of a message about the only row.
"""

# ruff: noqa: E501 (messages stand as they are)
from __future__ import annotations

import pytest

from fastpeft.data import build_preference_dataset, build_prompt_dataset, build_sft_dataset
from fastpeft.data.survey import survey
from fastpeft.errors import UserError

BUILD = {"sft": build_sft_dataset, "preference": build_preference_dataset, "prompt": build_prompt_dataset}
GOOD = b'{"input": "a", "output": "b"}\n'
ALONE = "FILE: 1 of 1 rows cannot be used\nFILE:1:"
KEYS = "the keys 'input' and 'output', 'prompt' and 'completion', 'instruction' and 'output', 'messages', 'conversations', or 'text'"
SKIP = "(one bad row; on_bad_row: skip leaves it out)"
MANGLED = [
    pytest.param("sft", b"", "FILE: it is empty; it needs rows with KEYS", id="empty"),
    pytest.param("sft", b"\n \n\t\n", "FILE: it is empty; it needs rows with KEYS", id="blank-lines"),
    pytest.param(
        "sft", b"\x1f\x8b\x08\x00abc", "FILE is compressed with gzip; unpack it first (gunzip -k data.jsonl)", id="gzip"
    ),
    pytest.param("sft", b"PAR1\x15\x04", "FILE is a Parquet file; convert it to JSON Lines first", id="parquet"),
    pytest.param(
        "sft",
        b'\xff\xfe{\x00"\x00i\x00n\x00p\x00u\x00t\x00"\x00:\x00 \x00"\x00a\x00"\x00}\x00',
        "FILE is UTF-16 text; save it as UTF-8",
        id="utf-16",
    ),
    pytest.param(
        "sft",
        b'[{"input": "a", "output": "b"}]',
        "FILE begins with '[', a JSON list; JSON Lines has one object a line and no list around",
        id="json-list",
    ),
    pytest.param(
        "sft",
        b'{\n  "input": "a",\n  "output": "b"\n}\n',
        "FILE: its first object goes over several lines; JSON Lines has one object a line",
        id="pretty-printed",
    ),
    pytest.param(
        "sft",
        b"input,output\na,b\n",
        "FILE: its first line reads like the head of a CSV table; convert it to JSON Lines first",
        id="csv",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": "caf\xe9", "output": "b"}',
        "FILE:2: byte 0xe9 at position 15 is not UTF-8; save the file as UTF-8 SKIP",
        id="latin-1",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": "a", "outp',
        'FILE:2: not valid JSON: a text that does not end on its line, begun at column 16: {"input": "a",  --> "outp SKIP',
        id="cut-off",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": "a", "output": "b"}{"input": "a", "output": "b"}',
        'FILE:2: not valid JSON: a second value on one line at column 30: {"input": "a", "output": "b"} --> {"input": "a", "output": "b"} SKIP',
        id="two-objects-on-a-line",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": "a", "output": "b",}',
        'FILE:2: not valid JSON: a comma before the closing bracket at column 30: {"input": "a", "output": "b", --> } SKIP',
        id="trailing-comma",
    ),
    pytest.param(
        "sft",
        GOOD + b"{'input': 'a', 'output': 'b'}",
        "FILE:2: not valid JSON: single quotes (keys and texts stand in double quotes) at column 2: { --> 'input': 'a', 'output': 'b'} SKIP",
        id="single-quotes",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": "a\nb", "output": "c"}',
        'FILE: 2 of 3 rows cannot be used\nFILE:2: not valid JSON: a text that does not end on its line, begun at column 11: {"input":  --> "a\nFILE:3: not valid JSON: expecting value at column 1:  --> b", "output": "c"}\nMend them, or leave them out with on_bad_row: skip.',
        id="raw-newline-in-a-string",
    ),
    pytest.param(
        "sft",
        GOOD + b"" + bytes(40) + b'\n{"input": "a", "output": "b"}\n',
        "FILE:2: the line has zero bytes, as after a crash or in UTF-32; write the file again, as UTF-8 SKIP",
        id="zero-bytes",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": "a", "output": "b", "output": "c"}',
        "FILE:2: key 'output' stands 2 times in one object; keep one SKIP",
        id="a-key-twice",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"inptu": "a", "ouput": "b"}',
        "FILE:2: no keys 'input' and 'output'; found 'inptu', 'ouput'; did you mean 'input' where it says 'inptu' and 'output' where it says 'ouput'? SKIP",
        id="misspelt-keys",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"instruction": "a", "response": "b"}',
        "FILE:2: no key 'output'; found 'instruction', 'response'; a row needs KEYS SKIP",
        id="alpaca",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": "a", "output": 42}',
        "FILE:2: key 'output' is a number (42); it must be a string SKIP",
        id="number-for-text",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": null, "output": "b"}',
        "FILE:2: key 'input' is null; it must be a string SKIP",
        id="null-for-text",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": "a", "output": {"k": 1}}',
        "FILE:2: key 'output' is an object ({\"k\": 1}); it must be a string; write structured answers as a JSON string SKIP",
        id="object-for-text",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": "\\ud83d", "output": "b"}',
        "FILE:2: key 'input' has half of a surrogate pair at character 1; write the character itself or both \\u escapes SKIP",
        id="half-a-surrogate-pair",
    ),
    pytest.param(
        "sft",
        GOOD + b'"just text"',
        "FILE:2: the line is a string; it must be an object with KEYS SKIP",
        id="a-line-of-text",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"messages": [{"role": "user", "content": "a"}]}',
        "FILE:2: the last message is the user's; a training dialogue ends with the assistant's SKIP",
        id="no-last-answer",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}',
        "FILE:2: messages[1]: role is 'asistant'; did you mean 'assistant'? SKIP",
        id="misspelt-role",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"messages": [{"from": "human", "value": "a"}]}',
        "FILE:2: messages[0]: no key 'role' and 'content'; found 'from', 'value'; such turns stand under the key 'conversations' SKIP",
        id="sharegpt-turns",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"input": "", "output": ""}',
        "FILE:2: prompt and output are both empty; there is nothing to learn SKIP",
        id="both-empty",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"instruction": "a", "input": 3, "output": "b"}',
        "FILE:2: key 'input' is a number (3); it must be a string SKIP",
        id="alpaca-input-is-a-number",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"instruction": "a", "input": "b", "ouput": "c"}',
        "FILE:2: no key 'output'; found 'instruction', 'input', 'ouput'; did you mean 'output' where it says 'ouput'? SKIP",
        id="alpaca-output-misspelt",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"instrution": "a", "input": "b", "output": "c"}',
        "FILE:2: key 'instrution' stands beside 'input' and 'output'; did you mean 'instruction'? If it is no part of the prompt, give it another name SKIP",
        id="alpaca-instruction-misspelt",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"instrution": "a", "output": "c"}',
        "FILE:2: no key 'instruction'; found 'instrution', 'output'; did you mean 'instruction' where it says 'instrution'? SKIP",
        id="alpaca-instruction-misspelt-without-input",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"conversation": [{"from": "human", "value": "a"}]}',
        "FILE:2: no key 'conversations'; found 'conversation'; did you mean 'conversations' where it says 'conversation'? SKIP",
        id="conversations-misspelt",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"conversations": [{"from": "humen", "value": "a"}, {"from": "gpt", "value": "b"}]}',
        "FILE:2: conversations[0]: from is 'humen'; did you mean 'human'? SKIP",
        id="from-misspelt",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]}',
        "FILE:2: conversations[1]: from is 'bing'; it must be one of human, gpt, system, user, assistant SKIP",
        id="from-unknown",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"conversations": [{"from": "human", "vlaue": "a"}]}',
        "FILE:2: conversations[0]: no key 'value'; found 'from', 'vlaue'; did you mean 'value' where it says 'vlaue'? SKIP",
        id="value-misspelt",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"conversations": [{"role": "user", "content": "a"}]}',
        "FILE:2: conversations[0]: no key 'from' and 'value'; found 'role', 'content'; such turns stand under the key 'messages' SKIP",
        id="messages-under-conversations",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"conversations": "a"}',
        "FILE:2: key 'conversations' is a string; it must be a list of {'from', 'value'} objects SKIP",
        id="conversations-are-text",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"conversations": [{"from": "human", "value": "a"}]}',
        "FILE:2: the last message is the user's; a training dialogue ends with the assistant's SKIP",
        id="sharegpt-without-answer",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"txet": "a"}',
        "FILE:2: no key 'text'; found 'txet'; did you mean 'text' where it says 'txet'? SKIP",
        id="text-misspelt",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"text": " "}',
        "FILE:2: key 'text' is empty; there is nothing to learn SKIP",
        id="text-empty",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"text": "a", "output": "b"}',
        "FILE:2: the row has 'text' and 'output'; keep the keys of one form, so that it is clear what to train on SKIP",
        id="text-beside-a-part-of-another-form",
    ),
    pytest.param(
        "sft",
        GOOD + b'{"conversations": [], "messages": []}',
        "FILE:2: the row has 'messages' and 'conversations'; keep the keys of one form, so that it is clear what to train on SKIP",
        id="two-kinds-of-dialogue",
    ),
    pytest.param(
        "preference",
        b'{"prompt": "p", "chosen": "a", "rejcted": "b"}',
        "ALONE no key 'rejected'; found 'prompt', 'chosen', 'rejcted'; did you mean 'rejected' where it says 'rejcted'?",
        id="rejected-misspelt",
    ),
    pytest.param(
        "preference",
        b'{"prompt": "p", "chosen": "a", "rejected": " "}',
        "ALONE key 'rejected' is empty; an answer needs text to be better or worse than another",
        id="empty-answer",
    ),
    pytest.param(
        "preference",
        b'{"prompt": "p", "responses": ["a", "b"], "ranking": [1]}',
        "ALONE key 'ranking' is a list of 1; it must be a list with a number for each of the 2 responses",
        id="ranking-too-short",
    ),
    pytest.param(
        "preference",
        b'{"prompt": "p", "responses": ["a", "b"], "ranking": [0, 1]}',
        "ALONE key 'ranking' has 0; it gives each response its place, 1 for the best, 2 for the next",
        id="ranking-from-zero",
    ),
    pytest.param(
        "preference",
        b'{"prompt": "p", "responses": ["a", "b"], "scores": [1, NaN]}',
        "ALONE scores[1] is a number (nan); it must be a finite number",
        id="score-is-nan",
    ),
    pytest.param(
        "prompt",
        b'{"propmt": "p"}',
        "ALONE no key 'input', 'prompt', 'instruction', 'messages' or 'conversations'; found 'propmt'; did you mean 'prompt' where it says 'propmt'?",
        id="no-prompt",
    ),
    pytest.param(
        "prompt",
        b'{"prompt": "  "}',
        "ALONE the prompt is empty; there is nothing to answer",
        id="blank-prompt",
    ),
]


@pytest.mark.parametrize(("kind", "content", "message"), MANGLED)
def test_a_mangled_file_is_told_of_in_full(tmp_path, plain_tokenizer, kind, content, message):
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        BUILD[kind](file, plain_tokenizer)
    assert str(caught.value) == message.replace("ALONE", ALONE).replace("FILE", str(file)).replace(
        "KEYS", KEYS
    ).replace("SKIP", SKIP)


@pytest.mark.parametrize(("kind", "content", "message"), MANGLED)
def test_the_check_says_the_same_of_each_row(tmp_path, plain_tokenizer, kind, content, message):
    """Rows are complained of in training's words; a file that is none is refused."""
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    expected = (
        message.replace("ALONE", ALONE)
        .replace("FILE", str(file))
        .replace("KEYS", KEYS)
        .removesuffix(" SKIP")
        .split("\n")
    )
    if not expected[0].startswith(f"{file}:") or " rows cannot be used" not in expected[0]:
        rows = [line for line in expected if line.startswith(f"{file}:2: ")]
    else:
        rows = [line for line in expected[1:] if line.startswith(f"{file}:")]
    if rows:
        assert survey(file, plain_tokenizer, kind=kind, workers=1).complaints == rows
    else:
        with pytest.raises(UserError):
            survey(file, plain_tokenizer, kind=kind, workers=1)
