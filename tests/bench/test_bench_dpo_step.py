"""``python -m bench dpo_step`` on a CPU: a tiny model, and rows of the lengths that are said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as cli
from bench.dpo import pairs
from bench.step import Setup, word_tokenizer


def test_a_tiny_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dpo_step", "--device", "cpu", "--peers", ""], results=tmp_path) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dpo_step")]
    assert "fastpeft full" in row and "tok/s" in row
    (record,) = [json.loads(line) for line in (tmp_path / "dpo_step.jsonl").read_text().splitlines()]
    assert len(record["outcome"]["seconds"]) == record["setup"]["steps"] == 2


def test_pairs_have_the_tokens_that_are_said() -> None:
    setup = Setup(vocab=256, batch=2, tokens=32, steps=2, warmup=1)
    tokenizer = word_tokenizer(setup)
    rows = pairs(setup)
    assert len(rows) == 6
    for row in rows:
        for answer in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[answer])["input_ids"]
            assert len(ids) == 31 and min(ids) >= 4  # and the end token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "tlr"], "no peer 'tlr'; did you mean 'trl'? there are trl"),
        (["--batch", "0"], "--batch is 0; it is too small"),
    ],
    ids=["peer", "batch"],
)
def test_mistakes_get_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["dpo_step", "--device", "cpu", *arguments], results=tmp_path) == 2
    assert capsys.readouterr().err == f"bench: {message}\n"
