"""``python -m bench`` and ``pytest bench`` as a user runs them, on the CPU's small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as cli
from bench.suites import OF_STACKS, SUITES

ROOT = Path(__file__).resolve().parents[2]


def bench(tmp_path: Path, *arguments: str) -> int:
    return cli.main(["--device", "cpu", *arguments], results=tmp_path)


def test_list_names_every_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tmp_path, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*SUITES, *OF_STACKS]
    assert bench(tmp_path, "--list", "adamw") == 0
    assert "  adamw-tensors1-params1M-fp32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nf4_gem"],
            "no suite 'nf4_gem'; did you mean 'nf4_gemm'? "
            "the suites are nf4_quant, nf4_gemm, experts, lora, blocks, adamw, paged_adamw, loss",
        ),
        (["lora", "--filter", "m=7"], "no case of lora contains 'm=7'; --list SUITE shows the ids"),
        (["lora", "--reps", "0"], "--reps is 0; it takes 1 or more"),
    ],
    ids=["suite", "filter", "reps"],
)
def test_mistakes_get_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench(tmp_path, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"bench: {message}\n"
    assert captured.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--device", "cuda"], results=tmp_path) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_a_gpu_needs_a_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "build_info", lambda: {"cuda": False})
    with pytest.raises(ValueError, match="built without CUDA; rebuild"):
        cli.pick_device(None)
    assert cli.pick_device("cpu") == torch.device("cpu")


def test_quick_runs_every_suite_and_keeps_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tmp_path, "--quick", "--reps", "2", "--seed", "7") == 0
    printed = capsys.readouterr().out
    assert "commit" in printed
    assert "seed      7" in printed
    for name, suite in SUITES.items():
        cases = suite.select("cpu", quick=True)
        results = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [result["case"] for result in results] == [case.id for case in cases]
        for case, result in zip(cases, results, strict=True):
            assert f"{case.label} | " in printed
            assert result["fastpeft"]["status"] == "ok"
            assert tuple(result["peers"]) == suite.peers
            # A peer may be absent here, but one that runs must compute the same thing.
            assert {peer["status"] for peer in result["peers"].values()} <= {"ok", "not installed"}, result["peers"]
    assert printed.splitlines()[-1].split()[0] in {"loss", *SUITES["loss"].peers}


def test_no_save_leaves_nothing(tmp_path: Path) -> None:
    assert bench(tmp_path, "nf4_quant", "--filter", "nf4_dequantize-n256", "--reps", "1", "--no-save") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_row_makes_the_command_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, doubling_case
) -> None:
    wrong = replace(SUITES["adamw"], cases=lambda device_type: [doubling_case(lambda x: x * 3)])
    monkeypatch.setitem(SUITES, "adamw", wrong)
    assert bench(tmp_path, "adamw", "--reps", "1") == 1
    assert "double n=64 fp32 | WRONG: relative error 0.5, at most 0.001" in capsys.readouterr().out
    (line,) = (tmp_path / "adamw.jsonl").read_text().splitlines()
    assert json.loads(line)["fastpeft"]["status"] == "wrong"


def test_the_cases_run_under_pytest_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    saved = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", f"--benchmark-json={saved}"]
    command += ["-k", "nf4_dequantize-n256", "-p", "no:cacheprovider"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(saved.read_text())
    assert results["machine_info"]["fastpeft"]["packages"]["torch"] == torch.__version__
    ours = [run for run in results["benchmarks"] if run["name"].endswith("-fastpeft]")]
    assert [run["group"] for run in ours] == ["nf4_dequantize-n256-k512-bf16"]
    assert ours[0]["extra_info"]["mode"] == "cpu"
    assert 0 < ours[0]["stats"]["median"] < 0.1
