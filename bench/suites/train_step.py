"""A whole QLoRA step on the shape of Llama-3-8B: ``python -m bench train_step --peers hf,liger,unsloth``.

Each stack runs in a process of its own (`bench.step`), one after the other. A row is a stack: tokens a second, time,
peak memory, and how many times as fast fastpeft is. A peer that is not installed is a row that says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.case import OURS
from bench.peers.train_step import STACKS
from bench.process import known_names, run_stacks
from bench.report import format_ratio
from bench.step import Setup, median

NAME = "train_step"
ABOUT = "a whole QLoRA step on the shape of Llama-3-8B, each stack in its process; it has options of its own (--help)"
TINY = {
    "layers": 2,
    "hidden": 64,
    "intermediate": 128,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 256,
    "batch": 2,
    "tokens": 32,
    "rank": 4,
    "steps": 2,
    "warmup": 1,
}
_QUICK = {"layers": 8}
# Qwen3-30B-A3B.
MIXTURE = {
    "layers": 48,
    "hidden": 2048,
    "intermediate": 6144,
    "heads": 32,
    "kv_heads": 4,
    "vocab": 151936,
    "experts": 128,
    "chosen": 8,
    "expert_width": 768,
}
TINY_MIXTURE = {**TINY, "experts": 4, "chosen": 2, "expert_width": 64}
_MODES = ("full", "selective", "offload", "none")
_NAMED_COSTS = 3
_SHOWN_KERNELS = 25


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
        setups = _setups(options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    ours: dict[str, Any] | None = None

    def rows(setup: Setup, outcome: dict[str, Any]) -> list[str]:
        nonlocal ours
        if setup.stack == OURS and outcome["status"] == "ok" and ours is None:
            ours = outcome
        return [format_row(setup, outcome, ours), *(profile_lines(outcome) if "kernels" in outcome else ())]

    kept = None if options.no_save else results
    return run_stacks(NAME, "bench.step", setups, _describe(setups[0]), rows, kept)


def format_row(setup: Setup, outcome: dict[str, Any], ours: dict[str, Any] | None, suite: str = NAME) -> str:
    """One line: the stack, tokens a second, time, memory, and fastpeft's speed and memory beside a peer's."""
    name = setup.stack if setup.stack != OURS else f"{OURS} {setup.checkpointing}"
    if setup.adapts_experts:
        name += " experts too"
    if setup.stack == OURS and setup.budget_gb is not None:
        name += f" {setup.budget_gb:g} GB"
    label = f"{suite} {name:<22}"
    if outcome["status"] != "ok":
        return f"{label} | {outcome['status']}{outcome['detail'] and ': '}{outcome['detail']}"
    seconds = median(outcome["seconds"])
    spread = f"(min {min(outcome['seconds']) * 1e3:.0f} max {max(outcome['seconds']) * 1e3:.0f})"
    parts = [f"{setup.batch * setup.tokens / seconds:,.0f} tok/s", f"{seconds * 1e3:.0f} ms {spread}"]
    if outcome["peak_bytes"] is not None:
        parts.append(f"peak {outcome['peak_bytes'] / 1e9:.2f} GB")
    if ours is not None and ours is not outcome:
        ratio = seconds / median(ours["seconds"])
        parts.append(f"fastpeft {format_ratio(ratio)}")
        if outcome["peak_bytes"]:
            parts.append(f"its memory over ours {outcome['peak_bytes'] / ours['peak_bytes']:.2f}")
    if "losses" in outcome:
        parts.append(f"loss {outcome['losses'][-1]:.3f}")
    if outcome["note"]:
        parts.append(outcome["note"])
    return " | ".join([label, *parts])


def profile_lines(outcome: dict[str, Any]) -> list[str]:
    """Share of a step's time by kernel."""
    kernels = outcome["kernels"]
    total = sum(kernel["us"] for kernel in kernels)
    seconds = median(outcome["seconds"])
    lines = [
        f"profile   {total / 1e3:.1f} ms in {sum(k['calls'] for k in kernels)} calls of {len(kernels)} kernels; "
        f"a step takes {seconds * 1e3:.1f} ms, enqueueing it {outcome['enqueue_seconds'] * 1e3:.1f} ms"
    ]
    for kernel in kernels[:_SHOWN_KERNELS]:
        name = kernel["name"] if len(kernel["name"]) <= 90 else kernel["name"][:87] + "..."
        lines.append(f"  {kernel['us'] / total:6.1%} {kernel['us'] / 1e3:9.2f} ms {kernel['calls']:6d}x  {name}")
    largest = ", ".join(k["name"].split("<")[0][-60:] for k in kernels[:_NAMED_COSTS])
    return [*lines, f"largest   {largest}"]


def _setups(options: argparse.Namespace) -> list[Setup]:
    """Ours in each kind of checkpointing that was asked for, then the peers.

    Raises:
        ValueError: a peer, a kind of checkpointing or a number that cannot be used.
    """
    names = ("layers", "batch", "tokens", "rank", "steps", "dropout")
    if options.mixture:
        sizes = read_sizes(options, names, TINY_MIXTURE, {**MIXTURE, **(_QUICK if options.quick else {})})
    else:
        sizes = read_sizes(options, names, TINY, _QUICK if options.quick else {})
    base = Setup(seed=options.seed, **sizes)
    modes = known_names(options.checkpointing, _MODES, "kind of checkpointing")
    peers = known_names(options.peers, STACKS, "peer")
    if options.budget_gb is not None:
        modes = list(dict.fromkeys([*modes, "selective"]))
    ours = [
        replace(
            base,
            checkpointing=mode,
            budget_gb=options.budget_gb if mode == "selective" else None,
            attention=options.attention,
            profile=options.profile,
        )
        for mode in modes
    ]
    if options.mixture:
        ours.append(replace(ours[0], adapts_experts=True))
    return [*ours, *(replace(base, stack=peer) for peer in peers)]


def read_sizes(
    options: argparse.Namespace, names: Iterable[str], on_cpu: dict[str, Any], on_gpu: dict[str, Any]
) -> dict[str, Any]:
    """The device, and the sizes of a setup: the suite's own for it, and over them what was given.

    Raises:
        ValueError: there is no GPU, or a number is too small.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no GPU; --device cpu runs a tiny model")
    sizes: dict[str, Any] = {"device": device, **(on_cpu if device == "cpu" else on_gpu)}
    for name in names:
        value = getattr(options, name)
        if value is not None:
            if value < (0 if name == "dropout" else 1):
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it is too small")
            sizes[name] = value
    return sizes


def _describe(setup: Setup) -> str:
    adapted = "the attention" if setup.experts else "all projections"
    return (
        f"{setup.describe()}; {setup.batch} x {setup.tokens} tokens, NF4, r={setup.rank} on {adapted}, dropout "
        f"{setup.dropout:g}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bench {NAME}", description=ABOUT)
    parser.add_argument(
        "--peers", default="hf,liger,unsloth", metavar="A,B", help=f"of {', '.join(STACKS)}; '' for none"
    )
    parser.add_argument("--checkpointing", default="full", metavar="A,B", help=f"fastpeft's, of {', '.join(_MODES)}")
    parser.add_argument("--budget-gb", type=float, help="also run 'selective' with this budget for activations")
    parser.add_argument(
        "--attention", choices=("auto", "flash", "cudnn"), default="auto", help="fastpeft's kernels first"
    )
    parser.add_argument(
        "--mixture", action="store_true", help="the shape of Qwen3-30B-A3B; of peers only hf, whose experts stay dense"
    )
    parser.add_argument("--layers", type=int, help="default 32, of a mixture 48")
    parser.add_argument("--batch", type=int, help="sequences, default 4")
    parser.add_argument("--tokens", type=int, help="of a sequence, default 2048")
    parser.add_argument("--rank", type=int, help="default 16")
    parser.add_argument("--dropout", type=float, help="of the adapters, default 0")
    parser.add_argument("--steps", type=int, help="timed, default 5")
    parser.add_argument("--profile", action="store_true", help="share of fastpeft's time by kernel")
    parser.add_argument("--quick", action="store_true", help="8 layers")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: a GPU where there is one; a CPU runs a tiny model"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/ alone")
    return parser
