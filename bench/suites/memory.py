"""What ``fastpeft estimate`` says beside the peak of real steps: ``python -m bench memory --methods lora,qlora``.

Each method runs in a process of its own (`bench.memory`), on a Llama of random weights: in NF4 for qlora, dense
bf16 for the others. A row is a method at a length: bytes predicted and measured, their ratio, and the moment of a step
at which most is expected. The last line holds the worst ratio against the bar.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.memory import MemorySetup
from bench.process import known_names, run_stacks
from bench.step import Setup
from bench.suites.train_step import read_sizes

NAME = "memory"
ABOUT = "what `fastpeft estimate` says beside the peak of real steps; it has options of its own (--help)"
BAR = 0.05
_ON_GPU: dict[str, Any] = {"layers": 8, "batch": 1, "steps": 3}
_ON_CPU: dict[str, Any] = {
    "layers": 4,
    "hidden": 128,
    "intermediate": 512,
    "heads": 4,
    "kv_heads": 1,
    "vocab": 1000,
    "batch": 4,
    "steps": 2,
    "lengths": (64, 128),
}


def main(arguments: list[str], results: Path) -> int:
    """Run the suite.

    Args:
        arguments: after the suite's name.
        results: folder the JSON lines go to.
    Returns:
        0; 1 when a case failed or is further off than the bar; 2 for a mistake in the arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        setups = _setups(options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    cases: list[tuple[str, dict[str, Any]]] = []

    def rows(setup: Setup, outcome: dict[str, Any]) -> list[str]:
        assert isinstance(setup, MemorySetup)
        cases.extend((setup.method, case) for case in outcome.get("cases", ()))
        return format_rows(setup, outcome)

    kept = None if options.no_save else results
    failed = run_stacks(NAME, "bench.memory", setups, _describe(setups[0]), rows, kept)
    line, met = closing_line(cases)
    print(line)
    return int(bool(failed) or not met)


def format_rows(setup: MemorySetup, outcome: dict[str, Any]) -> list[str]:
    """A line for each length."""
    label = f"{NAME} {setup.method:<13}"
    if outcome["status"] != "ok":
        return [f"{label} | {outcome['status']}: {outcome['detail']}"]
    rows = []
    for case in outcome["cases"]:
        parts = [f"{label} t={case['tokens']:<5}", f"predicted {_size(case['predicted'])}"]
        if case["status"] == "ok":
            phase = max(case["phases"], key=lambda name: case["phases"][name])
            parts += [f"measured {_size(case['measured'])} in {phase}", f"{case['predicted'] / case['measured']:.1%}"]
        else:
            parts.append(f"{case['status']}: {case['detail']}")
        rows.append(" | ".join([*parts, f"most in {case['when']}"]))
    return rows


def closing_line(cases: list[tuple[str, dict[str, Any]]]) -> tuple[str, bool]:
    """The worst prediction beside the bar.

    Args:
        cases: method and outcome of each length.
    Returns:
        The line, and whether all were measured and are within the bar.
    """
    measured = [(name, case) for name, case in cases if case["status"] == "ok"]
    if not measured:
        return f"{NAME}    nothing was measured", False
    name, case = max(measured, key=lambda one: abs(_deviation(one[1])))
    met = abs(_deviation(case)) <= BAR
    missing = len(cases) - len(measured)
    line = (
        f"{NAME}    worst of {len(measured)}: {name} t={case['tokens']}, predicted {_deviation(case):+.1%}; "
        f"the bar of {BAR:.0%} is {'met' if met else 'missed'}"
    )
    return line + (f"; {missing} failed" if missing else ""), met and not missing


def _deviation(case: dict[str, Any]) -> float:
    return float(case["predicted"] / case["measured"] - 1)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"


def _setups(options: argparse.Namespace) -> list[MemorySetup]:
    """A setup for each method.

    Raises:
        ValueError: an unknown method, or a number that cannot be used.
    """
    from fastpeft.recipes.estimate_report import METHODS

    sizes = read_sizes(options, ("layers", "batch", "rank", "steps"), _ON_CPU, _ON_GPU)
    methods = known_names(options.methods, METHODS, "method")
    if not methods:
        raise ValueError("--methods is empty; it takes names, as full,lora")
    if options.tokens is not None:
        try:
            lengths = tuple(int(part) for part in options.tokens.split(","))
        except ValueError:
            lengths = (0,)
        if min(lengths) < 1:
            raise ValueError(f"--tokens is {options.tokens!r}; it takes numbers above 0, as 512,2048")
        sizes["lengths"] = lengths
    return [
        MemorySetup(checkpointing=options.checkpointing, seed=options.seed, method=method, **sizes)
        for method in methods
    ]


def _describe(setup: MemorySetup) -> str:
    return (
        f"Llama of random weights, {setup.layers} layers of {setup.hidden}/{setup.intermediate}, vocabulary "
        f"{setup.vocab}; {setup.batch} rows, r={setup.rank}, checkpointing {setup.checkpointing}, AdamW; NF4 for "
        "qlora, dense bf16 for the others"
    )


def _parser() -> argparse.ArgumentParser:
    from fastpeft.recipes.estimate_report import METHODS, MODES

    parser = argparse.ArgumentParser(prog=f"python -m bench {NAME}", description=ABOUT)
    parser.add_argument(
        "--methods",
        default="full,lora,qlora,prompt_tuning",
        metavar="A,B",
        help=f"of {', '.join(METHODS)}; default full,lora,qlora,prompt_tuning",
    )
    parser.add_argument(
        "--tokens", metavar="A,B", help="of a row, virtual ones included; default 512,2048,8192, on a CPU 64,128"
    )
    parser.add_argument("--batch", type=int, help="rows, default 1, on a CPU 4")
    parser.add_argument("--layers", type=int, help="default 8, on a CPU 4")
    parser.add_argument("--rank", type=int, help="of LoRA, default 16")
    parser.add_argument("--steps", type=int, help="at each length, default 3, on a CPU 2")
    parser.add_argument("--checkpointing", choices=MODES, default="full", help="what layers keep, default full")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: a GPU where there is one; a CPU runs a tiny model"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/ alone")
    return parser
