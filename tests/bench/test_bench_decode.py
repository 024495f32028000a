"""``python -m bench decode`` on a CPU: a tiny model, and what its rows say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as cli
from bench.decode import DecodeSetup, path_by_kernel
from bench.suites import decode


@pytest.mark.parametrize("more", [[], ["--adapter"]], ids=["base", "adapter"])
def test_a_tiny_model_at_two_batches(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["decode", "--device", "cpu", "--peers", "", "--batches", "1,3", *more], results=tmp_path) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("decode")]
    assert [row.split("|")[0].split()[1:] for row in rows] == [["fastpeft", "b=1"], ["fastpeft", "b=3"]]
    assert all("tok/s" in row and "ms a step" in row for row in rows)
    (record,) = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert [batch["batch"] for batch in record["outcome"]["batches"]] == [1, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "hf-statc"], "no peer 'hf-statc'; did you mean 'hf-static'? there are hf, hf-static"),
        (["--batches", "1,0"], "--batches is '1,0'; it takes numbers above 0, as 1,16,64"),
        (["--new-tokens", "0"], "--new-tokens is 0; it is too small"),
    ],
    ids=["peer", "batches", "tokens"],
)
def test_mistakes_get_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["decode", "--device", "cpu", *arguments], results=tmp_path) == 2
    assert capsys.readouterr().err == f"bench: {message}\n"


def test_a_row_tells_speed_a_step_and_the_ratio() -> None:
    def batch(seconds: float) -> dict[str, object]:
        return {"batch": 16, "seconds": [seconds], "prompt_seconds": [0.1], "peak_bytes": 6_000_000_000}

    setup = DecodeSetup(stack="hf")
    outcome = {"status": "ok", "note": "dynamic cache", "batches": [batch(2.0)]}
    (row,) = decode.format_rows(setup, outcome, {16: batch(0.5)})
    assert "512 tok/s | 30.16 ms a step | prompts 100.0 ms | peak 6.00 GB | fastpeft 4.0x" in row
    (failed,) = decode.format_rows(setup, {"status": "failed", "detail": "out of memory"}, {})
    assert failed.endswith("| failed: out of memory")


def test_time_up_to_a_kernels_end_by_hand() -> None:
    """Of kernels that overlap, each counts from the end of the one before it."""
    rows = path_by_kernel([(10.0, "a"), (12.0, "b"), (15.0, "a"), (16.0, "b")])
    assert rows == [{"name": "b", "calls": 2, "us": 3.0}, {"name": "a", "calls": 1, "us": 3.0}]
    assert decode.kernel_lines(rows) == ["   50.0%     1.50 us      2x  b", "   50.0%     3.00 us      1x  a"]
    assert decode.kernel_lines([]) == []
