"""Rows as people read them, results as programs read them, and the table a run ends with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.environment import Environment
from bench.roofline import Roofs, attained
from bench.runner import Contender, Row
from bench.timing import Times

SCHEMA = 1
_REASON_WIDTH = 100


def format_row(row: Row, roofs: Roofs) -> str:
    """One line: what, fastpeft's time and spread, share of the roof, and each peer's time over fastpeft's."""
    parts = [row.case.label]
    times = row.ours.times
    if times is None or row.work is None:
        mark = {"wrong": "WRONG", "failed": "FAILED"}[row.ours.status]
        parts.append(f"{mark}: {_shorten(row.ours.detail)}")
    else:
        parts.append(
            format_times(times) + (" eager" if row.ours.mode == "eager" else "") + _format_memory(row.ours, row)
        )
        reached = attained(row.work, times.median, roofs)
        unit = "FLOP/s" if reached.roof == "matmul" else "B/s"
        parts.append(f"{_si(reached.rate)}{unit} {reached.fraction:.0%} of {reached.roof} roof")
        parts.append("  ".join(_format_peer(peer, row) for peer in row.peers))
        if row.ours.note:
            parts.append(row.ours.note)
    return " | ".join(parts)


def format_times(times: Times) -> str:
    """``5.1 us (p20 5.0 p80 5.3)``, in the unit that suits the median."""
    unit, scale = ("us", 1.0) if times.median < 1e3 else ("ms", 1e-3)
    median, p20, p80 = (_digits(value * scale) for value in (times.median, times.p20, times.p80))
    return f"{median} {unit} (p20 {p20} p80 {p80})"


def format_ratio(ratio: float) -> str:
    """``3.1x``; two decimals below 2, where they decide who is ahead."""
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x"


def _format_peer(peer: Contender, row: Row) -> str:
    if peer.ratio is not None:
        mixed = peer.mode == "eager" and row.ours.mode == "graph"
        timed = f"{peer.name} {format_ratio(peer.ratio)}" + (" (both eager)" if mixed else "")
        return timed + _format_memory(peer, row)
    if peer.status == "not installed":
        return f"{peer.name} not installed"
    return f"{peer.name} {peer.status}: {_shorten(peer.detail)}"


def _format_memory(contender: Contender, row: Row) -> str:
    if not row.case.show_memory or contender.peak_bytes is None:
        return ""
    return f" +{_si(contender.peak_bytes)}B"


def _shorten(text: str) -> str:
    return text if len(text) <= _REASON_WIDTH else text[: _REASON_WIDTH - 3] + "..."


def _digits(value: float) -> str:
    """Three significant digits at least, without an exponent."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _si(rate: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if rate >= factor:
            return f"{_digits(rate / factor)} {prefix}"
    return f"{_digits(rate / 1e3)} k"


def record(row: Row, suite: str, environment: Environment, roofs: Roofs) -> dict[str, Any]:
    """A row as one JSON object, with everything needed to judge or repeat it."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": suite,
        "case": row.case.id,
        "op": row.case.op,
        "sizes": dict(row.case.sizes),
        "label": row.case.label,
        "seed": row.seed,
        "reps": row.reps,
        "fastpeft": _contender_record(row.ours),
        "fastpeft_eager_us": _times_record(row.eager),
        "peers": {peer.name: _contender_record(peer) for peer in row.peers},
        "check": None,
        "work": None,
        "roof": None,
        "roofs": {
            "read_bytes_s": roofs.read,
            "copy_bytes_s": roofs.copy,
            "matmul_flops_s": roofs.matmul,
            "link_bytes_s": roofs.link,
        },
        "environment": environment.as_dict(),
    }
    if row.bar is not None:
        result["check"] = {"measure": row.bar.measure, "tolerance": row.bar.tolerance}
    if row.work is not None:
        result["work"] = {"bytes": row.work.bytes, "flops": row.work.flops, "link_bytes": row.work.link_bytes}
        if row.ours.times is not None:
            reached = attained(row.work, row.ours.times.median, roofs)
            result["roof"] = {"name": reached.roof, "rate": reached.rate, "fraction": reached.fraction}
    return result


def _contender_record(contender: Contender) -> dict[str, Any]:
    error = contender.error
    return {
        "status": contender.status,
        "detail": contender.detail,
        # NaN and infinity are not JSON; the status already says wrong.
        "error": error if error is None or math.isfinite(error) else str(error),
        "time_us": _times_record(contender.times),
        "mode": contender.mode,
        "eager_because": contender.eager_because,
        "ratio": contender.ratio,
        "peak_bytes": contender.peak_bytes,
        "note": contender.note,
    }


def _times_record(times: Times | None) -> dict[str, Any] | None:
    if times is None:
        return None
    return {"p20": times.p20, "median": times.median, "p80": times.p80}


def append_record(folder: Path, suite: str, result: Mapping[str, Any]) -> Path:
    """Add a result as a line of ``<suite>.jsonl``; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.jsonl"
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(result, allow_nan=False) + "\n")
    return path


def summary(rows: Mapping[str, Sequence[Row]]) -> str:
    """The closing table: for each suite its rows, what went wrong, and the ratios to each peer.

    Args:
        rows: by suite.
    Returns:
        A line a suite and peer: geometric mean of the ratios, smallest and largest, and how many rows are lost.
    """
    table = [("suite", "rows", "wrong", "failed", "peer", "mean", "min", "max", "lost", "not compared")]
    for suite, of_suite in rows.items():
        statuses = [row.ours.status for row in of_suite]
        counts = (suite, str(len(of_suite)), str(statuses.count("wrong")), str(statuses.count("failed")))
        peers = list(dict.fromkeys(peer.name for row in of_suite for peer in row.peers))
        for name in peers or ["-"]:
            of_peer = [peer for row in of_suite for peer in row.peers if peer.name == name]
            ratios = [peer.ratio for peer in of_peer if peer.ratio is not None]
            table.append((*counts, name, *_ratio_cells(ratios), str(len(of_suite) - len(ratios))))
            counts = ("", "", "", "")
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, 4) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def _ratio_cells(ratios: Sequence[float]) -> tuple[str, str, str, str]:
    if not ratios:
        return ("-", "-", "-", "-")
    mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    lost = sum(ratio < 1 for ratio in ratios)
    return (format_ratio(mean), format_ratio(min(ratios)), format_ratio(max(ratios)), str(lost))
