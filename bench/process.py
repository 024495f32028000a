"""Stacks in processes of their own, for suites of whole steps."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.case import OURS
from bench.environment import ROOT, environment
from bench.report import append_record
from bench.step import Setup

_TIMEOUT_S = 540


def run_in_process(module: str, setup: Setup) -> dict[str, Any]:
    """Run a stack in its process; whatever goes wrong there is an outcome.

    Args:
        module: what Python runs; it takes the setup as JSON and prints its outcome as its last line.
        setup: of the stack.
    """
    command = [sys.executable, "-m", module, json.dumps(asdict(setup))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "detail": f"not done after {_TIMEOUT_S} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        return {"status": "failed", "detail": f"exit code {done.returncode}: {said[-1] if said else 'no output'}"}
    outcome: dict[str, Any] = json.loads(lines[-1])
    return outcome


def run_stacks(
    suite: str,
    module: str,
    setups: Sequence[Setup],
    model: str,
    rows: Callable[[Setup, dict[str, Any]], Iterable[str]],
    results: Path | None,
) -> int:
    """Run stacks one after the other, and print and keep their rows.

    Args:
        suite: its name, that of the file in ``results``.
        module: as for `run_in_process`.
        setups: of the stacks, fastpeft's first.
        model: what is run, in a line.
        rows: lines of a setup and its outcome; called in the order of the setups.
        results: folder the JSON lines go to; None to keep nothing.
    Returns:
        0; 1 when one of fastpeft's failed.
    """
    where = environment(torch.device(setups[0].device))
    print(where.header())
    print(f"model     {model}", flush=True)
    failed = False
    for setup in setups:
        outcome = run_in_process(module, setup)
        failed |= setup.stack == OURS and outcome["status"] != "ok"
        for row in rows(setup, outcome):
            print(row, flush=True)
        if results is not None:
            record = {"suite": suite, "setup": asdict(setup), "outcome": outcome, "environment": where.as_dict()}
            append_record(results, suite, record)
    return int(failed)


def known_names(given: str, choices: Iterable[str], what: str) -> list[str]:
    """Names from a list with commas.

    Raises:
        ValueError: one of them is none of the choices; the message has the nearest.
    """
    names = [name for name in given.split(",") if name]
    for name in names:
        if name not in choices:
            near = difflib.get_close_matches(name, choices, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"no {what} {name!r}; {hint}there are {', '.join(choices)}")
    return list(dict.fromkeys(names))
