"""``python -m bench [SUITE ...]``: measure, print a row a measurement, keep the results, end with a short table."""

from __future__ import annotations

import argparse
import difflib
import secrets
import sys
from pathlib import Path

import torch

from bench.environment import environment
from bench.report import append_record, format_row, record, summary
from bench.roofline import Roofs, measure_roofs
from bench.runner import Row, run_case
from bench.suites import OF_STACKS, SUITES
from bench.timing import Timer
from fastpeft.ops import build_info

RESULTS = Path(__file__).resolve().parent / "results"
_REPS = 20


def main(arguments: list[str] | None = None, results: Path = RESULTS) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; by default those of the process.
        results: folder the JSON lines go to.
    Returns:
        0; 1 when a row of fastpeft's is wrong or failed; 2 for a mistake in the arguments.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, suite in OF_STACKS.items():
        if name in arguments:
            return suite.main([argument for argument in arguments if argument != name], results)
    options = _parser().parse_args(arguments)
    try:
        names = _suite_names(options.suites)
        device = pick_device(options.device)
        cases = {name: SUITES[name].select(device.type, options.quick, options.filter) for name in names}
        if not any(cases.values()):
            raise ValueError(f"no case of {', '.join(names)} contains {options.filter!r}; --list SUITE shows the ids")
        if options.reps < 1:
            raise ValueError(f"--reps is {options.reps}; it takes 1 or more")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.list:
        for name in names:
            print(f"{name}: {SUITES[name].about}; {len(cases[name])} cases on {device.type}")
            for case in cases[name] if options.suites else ():
                print(f"  {case.id}")
        if not options.suites:
            for suite in OF_STACKS.values():
                print(f"{suite.NAME}: {suite.ABOUT}")
        return 0

    where = environment(device)
    print(where.header())
    roofs = measure_roofs(device)
    print(_roofs_line(roofs))
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed      {seed}; ratios are a peer's time over fastpeft's: above 1, fastpeft is faster\n", flush=True)
    timer = Timer(device, eager_because="--eager was given" if options.eager else "")
    rows: dict[str, list[Row]] = {}
    for name in names:
        for case in cases[name]:
            row = run_case(case, timer, seed, options.reps)
            rows.setdefault(name, []).append(row)
            print(format_row(row, roofs), flush=True)
            if not options.no_save:
                append_record(results, name, record(row, name, where, roofs))
    print("\n" + summary(rows))
    return int(any(row.ours.status != "ok" for of_suite in rows.values() for row in of_suite))


def pick_device(name: str | None) -> torch.device:
    """The device to measure on.

    Args:
        name: ``cuda``, ``cpu``, or None for a GPU where there is one.
    Returns:
        The device, with its index when it is a GPU.
    Raises:
        ValueError: a GPU is asked for, and there is none or fastpeft was built without CUDA.
    """
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no GPU; --device cpu runs the small sizes")
    if not build_info()["cuda"]:
        raise ValueError(
            "there is a GPU, but fastpeft was built without CUDA; rebuild it with nvcc on PATH, or give --device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _suite_names(given: list[str]) -> list[str]:
    """The suites to run, all by default.

    Raises:
        ValueError: a name is not a suite's; the message has the nearest one.
    """
    for name in given:
        if name not in SUITES:
            near = difflib.get_close_matches(name, SUITES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"no suite {name!r}; {hint}the suites are {', '.join(SUITES)}")
    return list(dict.fromkeys(given)) or list(SUITES)


def _roofs_line(roofs: Roofs) -> str:
    link = f", link {roofs.link / 1e9:.3g} GB/s each way at once" if roofs.link else ""
    return (
        f"roofs     read {roofs.read / 1e9:.0f} GB/s, copy {roofs.copy / 1e9:.0f} GB/s, "
        f"bf16 matmul {roofs.matmul / 1e12:.3g} TFLOP/s{link} (measured now)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of fastpeft beside its peers.")
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help="suites to run; by default all but those of whole stacks (train_step, memory and so on)",
    )
    parser.add_argument("--list", action="store_true", help="list the suites, or the cases of the suites given")
    parser.add_argument("--quick", action="store_true", help="a subset of about two minutes on a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose id or label contains TEXT")
    parser.add_argument("--reps", type=int, default=_REPS, help=f"measured passes of each contender (default {_REPS})")
    parser.add_argument("--eager", action="store_true", help="launch from Python instead of replaying CUDA graphs")
    parser.add_argument("--seed", type=int, help="repeat the inputs of an earlier run")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results/ alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())
