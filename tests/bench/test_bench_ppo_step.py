"""``python -m bench ppo_step`` on a CPU: a tiny model, and its row beside the SFT step's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as cli


def test_a_tiny_update_beside_a_tiny_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ppo_step", "--device", "cpu"], results=tmp_path) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ppo_step")]
    assert [row.split()[1] for row in rows] == ["sft", "ppo"] and all("tok/s" in row for row in rows)
    records = [json.loads(line) for line in (tmp_path / "ppo_step.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["sft", "ppo"]
    assert len(records[1]["outcome"]["seconds"]) == 2


def test_a_mistake_gets_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ppo_step", "--device", "cpu", "--tokens", "0"], results=tmp_path) == 2
    assert capsys.readouterr().err == "bench: --tokens is 0; it is too small\n"
