"""Rows, JSON records and the closing table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.case import Bar, Case, Work
from bench.environment import environment
from bench.report import append_record, format_ratio, format_row, format_times, record, summary
from bench.roofline import Roofs, attained
from bench.runner import Contender, Row
from bench.timing import Times

ROOFS = Roofs(read=3.0e12, copy=2.4e12, matmul=777e12)


def times(median: float, p20: float | None = None, p80: float | None = None) -> Times:
    """Samples with exactly these percentiles."""
    low, high = p20 or median, p80 or median
    return Times((low, low, median, high, high) if p20 else (median,))


def gemm_row(ours: Contender, *peers: Contender, eager: Times | None = None) -> Row:
    case = Case("nf4_gemm", {"m": 16, "n": 4096, "k": 4096}, torch.bfloat16, prepare=lambda inputs: None)
    return Row(
        case,
        seed=1,
        reps=5,
        ours=ours,
        eager=eager,
        peers=list(peers),
        work=Work(bytes=8_568_000, flops=2 * 16 * 4096 * 4096),
        bar=Bar("relative error", 1e-2),
    )


def ours_in(median: float, p20: float, p80: float) -> Contender:
    return Contender("fastpeft", error=3e-3, times=times(median, p20, p80), mode="graph")


def test_row_reads_as_documented() -> None:
    row = gemm_row(
        ours_in(5.04, 5.0, 5.3),
        Contender("dense", times=times(15.6), mode="graph", ratio=3.1),
        Contender("bnb", times=times(35.3), mode="graph", ratio=7.0),
    )
    assert format_row(row, ROOFS) == (
        "nf4_gemm m=16 n=4096 k=4096 bf16 | 5.04 us (p20 5.00 p80 5.30) | 1.70 TB/s 57% of read roof | "
        "dense 3.1x  bnb 7.0x"
    )


def test_memory_stands_beside_the_times_where_a_case_wants_it() -> None:
    ours = replace(ours_in(5.04, 5.0, 5.3), peak_bytes=600_000_000)
    row = gemm_row(ours, Contender("dense", times=times(15.6), mode="graph", ratio=3.1, peak_bytes=2_100_000_000))
    assert "MB" not in format_row(row, ROOFS)
    row.case = replace(row.case, show_memory=True)
    text = format_row(row, ROOFS)
    assert "p80 5.30) +600 MB |" in text and text.endswith("dense 3.1x +2.10 GB")


def test_losing_absent_failing_and_wrong_peers_stay_in_the_row() -> None:
    row = gemm_row(
        ours_in(5.04, 5.0, 5.3),
        Contender("dense", times=times(2.5), mode="graph", ratio=0.5),
        Contender("bnb", status="not installed", detail="not installed"),
        Contender("peft", status="failed", detail="RuntimeError: no kernel"),
        Contender("other", status="wrong", detail="relative error 0.5, at most 0.01"),
    )
    assert format_row(row, ROOFS).endswith(
        "| dense 0.50x  bnb not installed  peft failed: RuntimeError: no kernel  "
        "other wrong: relative error 0.5, at most 0.01"
    )


def test_eager_rows_and_eager_peers_say_so() -> None:
    eager_peer = Contender("bnb", times=times(80.0), mode="eager", ratio=2.5)
    row = gemm_row(ours_in(5.04, 5.0, 5.3), eager_peer, eager=times(32.0))
    assert "bnb 2.5x (both eager)" in format_row(row, ROOFS)
    row.ours.mode = "eager"
    assert "p80 5.30) eager |" in format_row(row, ROOFS)
    assert format_row(row, ROOFS).endswith("bnb 2.5x")


@pytest.mark.parametrize(("status", "mark"), [("wrong", "WRONG: relative error nan"), ("failed", "FAILED: boom")])
def test_a_row_without_a_time_says_why(status: str, mark: str) -> None:
    detail = mark.partition(": ")[2]
    assert mark in format_row(gemm_row(Contender("fastpeft", status=status, detail=detail)), ROOFS)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5.1, "5.10 us (p20 5.10 p80 5.10)"),
        (45.04, "45.0 us (p20 45.0 p80 45.0)"),
        (381.4, "381 us (p20 381 p80 381)"),
        (1490.0, "1.49 ms (p20 1.49 p80 1.49)"),
    ],
)
def test_times_use_the_unit_of_their_median(value: float, text: str) -> None:
    assert format_times(times(value)) == text


def test_ratios_near_one_show_who_is_ahead() -> None:
    assert [format_ratio(ratio) for ratio in (0.972, 1.04, 3.14)] == ["0.97x", "1.04x", "3.1x"]


def test_the_larger_floor_names_the_roof() -> None:
    few_tokens = attained(Work(bytes=8_568_000, flops=2 * 16 * 4096 * 4096), 5.0, ROOFS)
    many_tokens = attained(Work(bytes=140_000_000, flops=2 * 8192 * 4096 * 4096), 400.0, ROOFS)
    assert (few_tokens.roof, many_tokens.roof) == ("read", "matmul")
    assert few_tokens.fraction == pytest.approx(8_568_000 / 3.0e12 / 5e-6)
    assert many_tokens.rate == pytest.approx(2 * 8192 * 4096 * 4096 / 400e-6)
    assert attained(Work(bytes=1000, memory="copy"), 1.0, ROOFS).roof == "copy"


def test_record_has_everything_and_is_one_json_line(tmp_path: Path) -> None:
    wrong = Contender("peft", status="wrong", detail="relative error nan", error=math.nan)
    row = gemm_row(ours_in(5.04, 5.0, 5.3), Contender("bnb", times=times(35.3), mode="graph", ratio=7.0), wrong)
    where = environment(torch.device("cpu"))
    path = append_record(tmp_path / "results", "nf4_gemm", record(row, "nf4_gemm", where, ROOFS))
    append_record(tmp_path / "results", "nf4_gemm", record(row, "nf4_gemm", where, ROOFS))
    assert path.name == "nf4_gemm.jsonl"
    first, second = path.read_text().splitlines()
    assert first == second
    loaded = json.loads(first, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert loaded["schema"] == 1
    assert loaded["case"] == "nf4_gemm-m16-n4096-k4096-bf16"
    assert loaded["sizes"] == {"m": 16, "n": 4096, "k": 4096}
    assert loaded["work"] == {"bytes": 8_568_000, "flops": 2 * 16 * 4096 * 4096, "link_bytes": 0}
    assert loaded["fastpeft"]["time_us"] == {"p20": 5.0, "median": 5.04, "p80": 5.3}
    assert loaded["fastpeft"]["error"] == 3e-3
    assert loaded["check"] == {"measure": "relative error", "tolerance": 1e-2}
    assert loaded["peers"]["bnb"]["ratio"] == 7.0
    assert loaded["peers"]["peft"]["error"] == "nan"
    assert loaded["roof"]["name"] == "read"
    needed = {"date", "commit", "device", "driver", "cuda", "fastpeft", "build", "python", "packages"}
    assert needed <= loaded["environment"].keys()
    assert {"torch", "bitsandbytes", "peft"} <= loaded["environment"]["packages"].keys()


def test_record_of_a_case_that_could_not_be_prepared() -> None:
    case = Case("lora", {"m": 1}, torch.bfloat16, prepare=lambda inputs: None)
    row = Row(case, seed=1, reps=5, ours=Contender("fastpeft", status="failed", detail="boom"))
    loaded = record(row, "lora", environment(torch.device("cpu")), ROOFS)
    assert (loaded["work"], loaded["roof"], loaded["check"], loaded["peers"]) == (None, None, None, {})
    assert json.dumps(loaded, allow_nan=False)


def test_header_names_the_conditions() -> None:
    header = environment(torch.device("cpu")).header()
    for word in ("commit", "fastpeft", "torch", "bitsandbytes", "threads"):
        assert word in header


def test_summary_counts_wins_losses_and_gaps() -> None:
    rows = [
        gemm_row(ours_in(5, 5, 5), Contender("dense", ratio=0.5), Contender("bnb", ratio=4.0)),
        gemm_row(ours_in(5, 5, 5), Contender("dense", ratio=2.0), Contender("bnb", status="not installed")),
        gemm_row(Contender("fastpeft", status="wrong")),
    ]
    lines = summary({"nf4_gemm": rows}).splitlines()
    assert lines[1].split() == ["nf4_gemm", "3", "1", "0", "dense", "1.00x", "0.50x", "2.0x", "1", "1"]
    assert lines[2].split() == ["bnb", "4.0x", "4.0x", "4.0x", "0", "2"]
