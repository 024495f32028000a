"""``python -m bench memory`` on a CPU: a tiny model beside its estimate, and what the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as cli
from bench.memory import MemorySetup
from bench.suites import memory


def test_a_tiny_model_beside_its_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", "--device", "cpu", "--methods", "qlora,prompt_tuning", "--tokens", "128,64"]
    assert cli.main(arguments, results=tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("memory") and "|" in line]
    assert [row.split("|")[0].split()[1:] for row in rows] == [
        *(["qlora", "t=64"], ["qlora", "t=128"], ["prompt_tuning", "t=64"], ["prompt_tuning", "t=128"])
    ]
    assert "the bar of 5% is met" in lines[-1]
    records = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert [record["setup"]["method"] for record in records] == ["qlora", "prompt_tuning"]
    for case in (case for record in records for case in record["outcome"]["cases"]):
        assert set(case["phases"]) == {"forward", "backward", "step"}
        assert case["measured"] == max(case["phases"].values()) > case["steady"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora,qlorra"], "no method 'qlorra'; did you mean 'qlora'?"),
        (["--methods", ""], "--methods is empty"),
        (["--tokens", "512,0"], "--tokens is '512,0'; it takes numbers above 0, as 512,2048"),
        (["--batch", "0"], "--batch is 0; it is too small"),
    ],
    ids=["method", "none", "tokens", "batch"],
)
def test_mistakes_get_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["memory", "--device", "cpu", *arguments], results=tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"bench: {message}")


def case_of(tokens: int, predicted: int, measured: int | None) -> dict[str, Any]:
    case = {"tokens": tokens, "predicted": predicted, "when": "the loss"}
    if measured is None:
        return {**case, "status": "failed", "detail": "OutOfMemoryError: CUDA out of memory"}
    return {**case, "status": "ok", "measured": measured, "phases": {"forward": 1, "backward": measured, "step": 2}}


def test_rows_and_the_closing_line() -> None:
    cases = [case_of(512, 5_390_000_000, 5_500_000_000), case_of(8192, 9_000_000_000, None)]
    rows = memory.format_rows(MemorySetup(method="lora"), {"status": "ok", "cases": cases})
    assert rows[0].endswith("t=512   | predicted 5.39 GB | measured 5.50 GB in backward | 98.0% | most in the loss")
    assert "predicted 9.00 GB | failed: OutOfMemoryError" in rows[1]
    line, met = memory.closing_line([("lora", case) for case in cases])
    assert "worst of 1: lora t=512, predicted -2.0%; the bar of 5% is met; 1 failed" in line and not met
    line, met = memory.closing_line([("full", case_of(1, 107, 100)), ("lora", case_of(1, 99, 100))])
    assert "worst of 2: full t=1, predicted +7.0%; the bar of 5% is missed" in line and not met
    assert memory.closing_line([("lora", case_of(1, 96, 100))])[1]
    assert not memory.closing_line([])[1]
    (failed,) = memory.format_rows(MemorySetup(), {"status": "failed", "detail": "exit code 1"})
    assert failed.endswith("| failed: exit code 1")
