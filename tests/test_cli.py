"""The command line itself: help, versions, exit codes, and how quickly it answers."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import fastpeft
from fastpeft.cli import main
from fastpeft.errors import UserError


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    code = left.value.code
    return 0 if code is None else int(code)


def test_help_names_the_commands_and_needs_no_torch(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(
        command in shown for command in ("sft", "generate", "quantize", "merge", "export", "plot", "info", "--version")
    )
    script = "import sys, fastpeft.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False False\n"


def test_help_answers_at_once():
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def seconds() -> float:
        before = spent()
        subprocess.run([sys.executable, "-m", "fastpeft", "--help"], capture_output=True, check=True)
        return spent() - before

    # Of the processor's time, which is what passes where nothing else runs; the clock's is that of its neighbours too.
    assert min(seconds() for _ in range(5)) < 0.6


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"fastpeft {fastpeft.__version__}\n"


def test_info_as_json(capsys: pytest.CaptureFixture[str]):
    assert run("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fastpeft"] == fastpeft.__version__
    assert found["native"]["loaded"] and isinstance(found["native"]["cuda"], bool)
    assert set(found["packages"]) >= {"torch", "transformers"}
    assert set(found["optional_packages"]) == {
        *("bitsandbytes", "datasets", "gguf", "matplotlib", "peft", "tensorboard", "trl", "wandb")
    }
    assert set(found["gpu"]) == {"driver", "devices", "note"}


def test_info_as_text(capsys: pytest.CaptureFixture[str]):
    assert run("info") == 0
    shown = capsys.readouterr().out
    assert "native core" in shown and "transformers" in shown and "(optional)" in shown


def test_info_without_a_native_core_says_so():
    script = (
        "import sys, json; sys.modules['fastpeft._C'] = None\n"
        "from fastpeft.recipes.info import described, environment\n"
        "found = environment(); print(json.dumps(found['native'])); print(described(found))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    native = json.loads(done.stdout.splitlines()[0])
    assert native["loaded"] is False and "could not be loaded" in native["error"]
    assert "NOT LOADED: ImportError: fastpeft's native core could not be loaded" in done.stdout


@pytest.mark.parametrize(
    ("archs", "capability", "supported"),
    [
        (["80", "90a", "ptx90"], (9, 0), True),
        (["80", "90a"], (8, 9), True),
        (["80", "90a"], (10, 0), False),
        (["80", "90a", "ptx90"], (10, 0), True),
        (["80"], (7, 5), False),
        (["86"], (8, 0), False),
        (["90a"], (9, 0), True),
        (["80"], (9, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_a_build_supports(archs: list[str], capability: tuple[int, int], supported: bool):
    from fastpeft.recipes.info import build_supports

    assert build_supports(archs, capability) is supported


def test_a_users_mistake_is_one_message_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("sft", str(tmp_path / "absent.yaml")) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'absent.yaml'}: there is no such file\n"
    assert run("plot", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"error: plot: {tmp_path} is not a run folder: there is no metrics.jsonl in it\n"


@pytest.mark.parametrize("arguments", [("--debug", "plot", "absent"), ("plot", "absent", "--debug")])
def test_debug_keeps_the_traceback(arguments: tuple[str, ...]):
    with pytest.raises(UserError):
        main(list(arguments))


@pytest.mark.parametrize("arguments", [("nonsense",), ("sft",), ("plot",), ("info", "--yaml")])
def test_wrong_usage_is_code_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_defect_keeps_its_traceback():
    script = (
        "import fastpeft.recipes as r\n"
        "def broken(*_): raise RuntimeError('a defect')\n"
        "r.plot_run = broken\n"
        "from fastpeft.cli import main\n"
        "main(['plot', 'x'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "a defect" in done.stderr


def test_control_c_is_code_130(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastpeft.recipes.plot_run", interrupted)
    assert run("plot", "x") == 130
