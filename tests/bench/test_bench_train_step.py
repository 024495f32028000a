"""``python -m bench train_step`` on a CPU: a tiny model, peers that may be missing, and what its rows say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as cli
from bench.step import Setup
from bench.suites import train_step


def test_a_tiny_step_with_a_missing_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train_step", "--device", "cpu", "--peers", "unsloth", "--checkpointing", "full,none", "--profile"]
    assert cli.main(arguments, results=tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("train_step")]
    assert [row.split("|")[0].split()[1] for row in rows] == ["fastpeft", "fastpeft", "unsloth"]
    assert "tok/s" in rows[0] and "2 layer" in rows[0]
    assert any(line.startswith("largest") for line in lines)
    records = [json.loads(line) for line in (tmp_path / "train_step.jsonl").read_text().splitlines()]
    full, none, unsloth = (record["outcome"] for record in records)
    assert full["losses"] == pytest.approx(none["losses"], rel=1e-2)
    assert full["losses"][-1] < full["losses"][0]
    if unsloth["status"] != "ok":
        assert rows[2].endswith("| not installed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "unslot"], "no peer 'unslot'; did you mean 'unsloth'? there are hf, liger, unsloth, unsloth-gc"),
        (["--checkpointing", "some"], "no kind of checkpointing 'some'; there are full, selective, offload, none"),
        (["--layers", "0"], "--layers is 0; it is too small"),
    ],
    ids=["peer", "checkpointing", "layers"],
)
def test_mistakes_get_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["train_step", "--device", "cpu", *arguments], results=tmp_path) == 2
    assert capsys.readouterr().err == f"bench: {message}\n"


def test_a_row_tells_speed_memory_and_ratio() -> None:
    def outcome(seconds: float, peak: int) -> dict[str, object]:
        return {"status": "ok", "seconds": [seconds], "peak_bytes": peak, "losses": [2.0], "note": ""}

    ours, peer = outcome(0.5, 8_000_000_000), outcome(0.8, 10_000_000_000)
    row = train_step.format_row(Setup(stack="hf"), peer, ours)
    assert "10,240 tok/s | 800 ms" in row
    assert "peak 10.00 GB | fastpeft 1.60x | its memory over ours 1.25" in row
    failed = train_step.format_row(Setup(stack="hf"), {"status": "failed", "detail": "out of memory"}, ours)
    assert failed.endswith("| failed: out of memory")
