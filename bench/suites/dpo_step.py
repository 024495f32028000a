"""A DPO step on the shape of Llama-3-8B, 8 layers: ``python -m bench dpo_step --peers trl``.

Each stack runs in a process of its own (`bench.dpo`). A row is a stack: tokens a second (a pair counts as two
sequences), time, peak memory, and how many times as fast fastpeft is.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.case import OURS
from bench.peers.dpo import STACKS
from bench.process import known_names, run_stacks
from bench.step import Setup
from bench.suites.train_step import TINY, format_row, read_sizes

NAME = "dpo_step"
ABOUT = "a DPO step on the shape of Llama-3-8B, 8 layers, each stack in its process; it has options of its own (--help)"
_SIZES = ("layers", "batch", "tokens", "rank", "steps")


def main(arguments: list[str], results: Path) -> int:
    """Run the suite.

    Args:
        arguments: after the suite's name.
        results: folder the JSON lines go to.
    Returns:
        0; 1 when fastpeft's step failed; 2 for a mistake in the arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        sizes = read_sizes(options, _SIZES, TINY, {"layers": 8, "tokens": 1024})
        base = Setup(checkpointing=options.checkpointing, seed=options.seed, **sizes)
        setups = [base, *(replace(base, stack=peer) for peer in known_names(options.peers, STACKS, "peer"))]
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    model = (
        f"Llama of random weights, {base.layers} layers of {base.hidden}/{base.intermediate}, NF4, r={base.rank}; "
        f"{base.batch} pairs of {base.tokens} tokens"
    )
    ours: dict[str, Any] | None = None

    def rows(setup: Setup, outcome: dict[str, Any]) -> list[str]:
        nonlocal ours
        if setup.stack == OURS and outcome["status"] == "ok":
            ours = outcome
        return [format_row(replace(setup, batch=2 * setup.batch), outcome, ours, NAME)]

    return run_stacks(NAME, "bench.dpo", setups, model, rows, None if options.no_save else results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bench {NAME}", description=ABOUT)
    parser.add_argument("--peers", default="trl", metavar="A,B", help=f"of {', '.join(STACKS)}; '' for none")
    parser.add_argument(
        "--checkpointing", choices=("full", "offload", "none"), default="full", help="fastpeft's, default full"
    )
    parser.add_argument("--layers", type=int, help="default 8")
    parser.add_argument("--batch", type=int, help="pairs, default 4")
    parser.add_argument("--tokens", type=int, help="of an answer with its prompt, default 1024")
    parser.add_argument("--rank", type=int, help="default 16")
    parser.add_argument("--steps", type=int, help="timed, default 5")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: a GPU where there is one; a CPU runs a tiny model"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/ alone")
    return parser
