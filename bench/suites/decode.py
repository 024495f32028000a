"""Greedy decoding on the shape of Llama-3-8B in NF4: ``python -m bench decode --peers hf,hf-static``.

Each stack runs in a process of its own (`bench.decode`). A row is a stack at a batch: new tokens a second with the
prompts' time in it, milliseconds a step without it, the prompts' own, peak memory, and how many times as fast fastpeft
is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.case import OURS
from bench.decode import DecodeSetup
from bench.peers.decode import STACKS
from bench.process import known_names, run_stacks
from bench.report import format_ratio
from bench.step import Setup, median
from bench.suites.train_step import MIXTURE, TINY, TINY_MIXTURE, read_sizes

NAME = "decode"
ABOUT = "greedy decoding on the shape of Llama-3-8B, each stack in its process; it has options of its own (--help)"
_SHOWN_KERNELS, _SHOWN_NAME = 12, 90
_TINY_SHAPE = {name: TINY[name] for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab")}


def main(arguments: list[str], results: Path) -> int:
    """Run the suite.

    Args:
        arguments: after the suite's name.
        results: folder the JSON lines go to.
    Returns:
        0; 1 when fastpeft's decoding failed; 2 for a mistake in the arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        setups = _setups(options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    ours: dict[int, dict[str, Any]] = {}

    def rows(setup: Setup, outcome: dict[str, Any]) -> list[str]:
        assert isinstance(setup, DecodeSetup)
        if setup.stack == OURS:
            ours.update({batch["batch"]: batch for batch in outcome.get("batches", ())})
        return format_rows(setup, outcome, ours)

    return run_stacks(NAME, "bench.decode", setups, _describe(setups[0]), rows, None if options.no_save else results)


def format_rows(setup: DecodeSetup, outcome: dict[str, Any], ours: dict[int, dict[str, Any]]) -> list[str]:
    """A line for each batch, with fastpeft's speed beside a peer's."""
    if outcome["status"] != "ok":
        said = f"{outcome['status']}{outcome['detail'] and ': '}{outcome['detail']}"
        return [f"{NAME} {setup.stack:<10} | {said}"]
    rows = []
    for found in outcome["batches"]:
        batch, seconds, prompts = found["batch"], median(found["seconds"]), median(found["prompt_seconds"])
        parts = [f"{NAME} {setup.stack:<10} b={batch:<3}", f"{batch * setup.new_tokens / seconds:,.0f} tok/s"]
        if setup.new_tokens > 1:
            parts.append(f"{(seconds - prompts) / (setup.new_tokens - 1) * 1e3:.2f} ms a step")
        parts.append(f"prompts {prompts * 1e3:.1f} ms")
        if found["peak_bytes"] is not None:
            parts.append(f"peak {found['peak_bytes'] / 1e9:.2f} GB")
        if setup.stack != OURS and batch in ours:
            parts.append(f"fastpeft {format_ratio(seconds / median(ours[batch]['seconds']))}")
        rows.append(" | ".join([*parts, outcome["note"]]))
        rows += kernel_lines(found.get("kernels", ()))
    return rows


def kernel_lines(kernels: Sequence[dict[str, Any]]) -> list[str]:
    """Share of the steps' time by kernel, from the end of the one before it to its own."""
    total = sum(kernel["us"] for kernel in kernels)
    return [
        f"  {kernel['us'] / total:6.1%} {kernel['us'] / kernel['calls']:8.2f} us {kernel['calls']:6d}x  "
        f"{kernel['name'][:_SHOWN_NAME]}"
        for kernel in kernels[:_SHOWN_KERNELS]
    ]


def _setups(options: argparse.Namespace) -> list[DecodeSetup]:
    """Ours, then the peers.

    Raises:
        ValueError: a peer or a number that cannot be used.
    """
    names = ("layers", "prompt_tokens", "new_tokens", "steps")
    small = {**_TINY_SHAPE, "steps": 1, "warmup": 1, "batches": (1, 3), "prompt_tokens": 16, "new_tokens": 8}
    large: dict[str, Any] = {"steps": 3, "warmup": 1}
    if options.mixture:
        small, large = {**TINY_MIXTURE, **small}, {**MIXTURE, **large}
    sizes = read_sizes(options, names, small, large)
    if options.batches is not None:
        given = options.batches.split(",")
        if not all(batch.isdecimal() and int(batch) > 0 for batch in given):
            raise ValueError(f"--batches is {options.batches!r}; it takes numbers above 0, as 1,16,64")
        sizes["batches"] = tuple(int(batch) for batch in given)
    base = DecodeSetup(seed=options.seed, adapter=options.adapter, profile=options.profile, **sizes)
    return [base, *(replace(base, stack=peer) for peer in known_names(options.peers, STACKS, "peer"))]


def _describe(setup: DecodeSetup) -> str:
    adapter = f", LoRA of rank {setup.rank} unmerged" if setup.adapter else ""
    return f"{setup.describe()}, NF4{adapter}; {setup.prompt_tokens} + {setup.new_tokens} tokens, greedy"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bench {NAME}", description=ABOUT)
    parser.add_argument("--peers", default="hf-static", metavar="A,B", help=f"of {', '.join(STACKS)}; '' for none")
    parser.add_argument("--batches", metavar="A,B", help="prompts at a time, default 1,16,64")
    parser.add_argument("--mixture", action="store_true", help="the shape of Qwen3-30B-A3B; peers' experts stay dense")
    parser.add_argument("--layers", type=int, help="default 32, of a mixture 48")
    parser.add_argument("--prompt-tokens", type=int, help="default 128")
    parser.add_argument("--new-tokens", type=int, help="default 64")
    parser.add_argument("--adapter", action="store_true", help="with LoRA on all linear layers but the head, unmerged")
    parser.add_argument(
        "--profile", action="store_true", help="share of the steps' time by fastpeft's kernels, on a GPU"
    )
    parser.add_argument("--steps", type=int, help="timed runs, default 3")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: a GPU where there is one; a CPU runs a tiny model"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/ alone")
    return parser
