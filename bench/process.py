"""Stacks in processes of their own, for suites of whole steps."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from bench.environment import ROOT
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
