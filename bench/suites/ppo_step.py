"""A PPO update on the shape of Llama-3-8B, four roles over one NF4 base: ``python -m bench ppo_step``.

Beside it stands fastpeft's own SFT step of the same tokens (`bench.step`), as what the roles add to its memory is the
question. No other library trains PPO with the roles on one quantised base, so there is no peer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.process import run_in_process
from bench.report import append_record
from bench.step import Setup
from bench.suites.train_step import TINY, format_row, read_sizes

NAME = "ppo_step"
ABOUT = "a PPO update on the shape of Llama-3-8B beside an SFT step; it has options of its own (--help)"
_SIZES = ("layers", "batch", "tokens", "rank", "steps")


def main(arguments: list[str], results: Path) -> int:
    """Run the suite.

    Args:
        arguments: after the suite's name.
        results: folder the JSON lines go to.
    Returns:
        0; 1 when one of the two failed; 2 for a mistake in the arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        base = Setup(
            checkpointing=options.checkpointing,
            seed=options.seed,
            **read_sizes(options, _SIZES, TINY, {"steps": 3, "warmup": 1}),
        )
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    where = environment(torch.device(base.device))
    print(where.header())
    print(
        f"model     Llama of random weights, {base.layers} layers of {base.hidden}/{base.intermediate}, NF4, "
        f"r={base.rank}; {base.batch} x {base.tokens} tokens, of which PPO draws half",
        flush=True,
    )
    outcomes: dict[str, dict[str, Any]] = {}
    for kind, module in (("sft", "bench.step"), ("ppo", "bench.ppo")):
        outcomes[kind] = run_in_process(module, base)
        print(format_row(replace(base, stack=kind), outcomes[kind], None, NAME), flush=True)
        if not options.no_save:
            record = {"suite": NAME, "kind": kind, "setup": asdict(base), "outcome": outcomes[kind]}
            append_record(results, NAME, {**record, "environment": where.as_dict()})
    peaks = [outcomes[kind].get("peak_bytes") for kind in ("sft", "ppo")]
    if all(peaks):
        print(f"memory    PPO's peak over SFT's: {peaks[1] / peaks[0]:.2f}")
    return int(any(outcome["status"] != "ok" for outcome in outcomes.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bench {NAME}", description=ABOUT)
    parser.add_argument(
        "--checkpointing", choices=("full", "offload", "none"), default="full", help="of both, default full"
    )
    parser.add_argument("--layers", type=int, help="default 32")
    parser.add_argument("--batch", type=int, help="prompts, default 4")
    parser.add_argument("--tokens", type=int, help="of a prompt with its completion, default 2048")
    parser.add_argument("--rank", type=int, help="default 16")
    parser.add_argument("--steps", type=int, help="timed, default 3")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: a GPU where there is one; a CPU runs a tiny model"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/ alone")
    return parser
