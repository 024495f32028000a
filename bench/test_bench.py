"""The suites under pytest-benchmark: ``pytest bench --benchmark-only``, with ``-k`` to choose.

A test is one contender of one case, and its group is the case, so pytest-benchmark's tables set fastpeft beside its
peers. Each is checked before it is timed; one that is not installed or cannot run is skipped with the reason. The
clock waits for the device. Contenders run one after the other here: for ratios that share the power state, use
``python -m bench``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
import torch

from bench.__main__ import pick_device
from bench.case import OURS, Case, PeerMissing
from bench.runner import describe, release_memory
from bench.suites import SUITES
from bench.timing import Timer

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

_DEVICE = pick_device(None)
_ROUNDS = 10
_SEED = 0
_CONTENDERS = [
    pytest.param(case, name, id=f"{case.id}-{name}")
    for suite in SUITES.values()
    for case in suite.select(_DEVICE.type)
    for name in (OURS, *suite.peers)
]


def device_clock() -> float:
    """Seconds, read after the device has done what was enqueued."""
    if _DEVICE.type == "cuda":
        torch.cuda.synchronize(_DEVICE)
    return time.perf_counter()


@pytest.fixture(scope="module")
def timer() -> Timer:
    return Timer(_DEVICE)


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    yield
    release_memory(_DEVICE)


@pytest.mark.benchmark(timer=device_clock)
@pytest.mark.parametrize(("case", "contender"), _CONTENDERS)
def test_bench(benchmark, timer: Timer, case: Case, contender: str) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = case.id
    with timer.scope():
        trial = case.prepare(case.inputs(_DEVICE, _SEED))
        try:
            calls = trial.ours if contender == OURS else trial.peers[contender]()
            outputs = calls.checkable()
        except PeerMissing as missing:
            pytest.skip(f"{contender} {missing}")
        except Exception as failure:
            if contender == OURS:
                raise
            pytest.skip(f"{contender} failed: {describe(failure)}")
        check = calls.check or trial.check
        error = check.error(outputs)
        assert check.passes(error), f"{contender}: {check.measure} {error:.2g}, at most {check.tolerance:g}"

        timed = timer.prepare(calls)
        benchmark.extra_info.update(mode=timed.mode, eager_because=timed.reason, error=error, note=calls.note)
        turn = itertools.count()

        def one_call() -> None:
            # The first of as many invocations as a pass has calls runs the whole pass: their mean is one call's time.
            if next(turn) % timed.calls == 0:
                timed.run()

        benchmark.pedantic(one_call, rounds=_ROUNDS, iterations=timed.calls)
