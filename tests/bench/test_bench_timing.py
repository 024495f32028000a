"""Percentiles, turns, gradient calls, and when a graph is given up; the GPU's part is stood in for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import timing
from bench.case import Calls
from bench.timing import Pass, Timer, Times, backward_only, forward_backward

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


class Graph:
    """Stands in for a captured graph."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        self.calls = calls

    def replay(self) -> None:
        timing._run_all(self.calls)


class GraphTimer(Timer):
    """A timer that takes the GPU's decisions without a GPU."""

    def __init__(self, eager_because: str = "", capture_error: Exception | None = None, pass_us: float = 1e4) -> None:
        super().__init__(CPU, eager_because)
        self._cuda = True
        self.capture_error = capture_error
        self.pass_us = pass_us

    def _capture(self, calls: list[Callable[[], Any]]) -> Any:
        if self.capture_error is not None:
            raise self.capture_error
        return Graph(calls)

    def _time_us(self, run: Callable[[], None]) -> float:
        run()
        return self.pass_us


@pytest.fixture(autouse=True)
def no_sync_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_synchronises", lambda calls: "")


def test_percentiles_interpolate() -> None:
    times = Times((5.0, 1.0, 4.0, 2.0, 3.0))
    assert (times.p20, times.median, times.p80) == pytest.approx((1.8, 3.0, 4.2))
    assert Times((7.0,)).p80 == 7.0
    assert Times((1.0, 2.0)).median == 1.5


def test_contenders_take_turns() -> None:
    order: list[str] = []
    passes = {name: Pass(lambda name=name: order.append(name), 1, "cpu") for name in "ab"}
    times = Timer(CPU).interleave(passes, reps=3)
    assert order == ["a", "b"] * 4  # one round to warm up, three measured
    assert {len(value.samples_us) for value in times.values()} == {3}


def test_a_pass_runs_every_input_set_equally_often_and_times_one_call() -> None:
    counts = [0, 0, 0]

    def count(index: int) -> None:
        counts[index] += 1

    timed = Timer(CPU).prepare(Calls([lambda i=i: count(i) for i in range(3)]))
    counts[:] = [0, 0, 0]
    timed.run()
    assert timed.mode == "cpu"
    assert sum(counts) == timed.calls
    assert len(set(counts)) == 1


def test_time_is_of_one_call() -> None:
    timer = GraphTimer(pass_us=800.0)
    times = timer.interleave({"a": Pass(lambda: None, calls=16, mode="graph")}, reps=2)
    assert times["a"].median == 50.0


def test_short_passes_are_captured_again_with_more_calls() -> None:
    timed = GraphTimer(pass_us=100.0).prepare(Calls([lambda: None, lambda: None]))
    assert (timed.mode, timed.calls, timed.reason) == ("graph", 20, "")


def test_long_passes_are_captured_once() -> None:
    assert GraphTimer(pass_us=1e5).prepare(Calls([lambda: None])).calls == 1


def test_a_failed_capture_is_timed_eagerly_with_its_first_cause() -> None:
    failure = RuntimeError("operation failed due to a previous error during capture")
    failure.__context__ = ValueError("the real reason\nand a second line")
    timer = GraphTimer(capture_error=failure)
    timed = timer.prepare(Calls([lambda: None]))
    assert timed.mode == "eager"
    assert timed.reason == "capture failed: ValueError: the real reason"


@pytest.mark.parametrize("where", ["timer", "call", "argument"])
def test_a_reason_given_beforehand_prevents_the_capture(where: str) -> None:
    timer = GraphTimer("told so" if where == "timer" else "", capture_error=AssertionError("captured"))
    calls = Calls([lambda: None], eager_because="told so" if where == "call" else "")
    timed = timer.prepare(calls, "told so" if where == "argument" else "")
    assert (timed.mode, timed.reason) == ("eager", "told so")


def test_forward_backward_returns_output_and_gradients_and_accumulates_nothing() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    call = forward_backward(lambda: x * w, [x, w], torch.tensor([1.0, 10.0]))
    for _ in range(2):
        out, dx, dw = call()
        assert out.tolist() == [3.0, 8.0]
        assert dx.tolist() == [3.0, 40.0]
        assert dw.tolist() == [1.0, 20.0]
    assert x.grad is None
    assert w.grad is None


def test_backward_only_runs_the_forward_once() -> None:
    forwards = []
    x = torch.tensor([1.0, 2.0], requires_grad=True)

    def forward() -> torch.Tensor:
        forwards.append(1)
        return x * x

    call = backward_only(forward, [x], torch.ones(2))
    assert [call()[0].tolist() for _ in range(3)] == [[2.0, 4.0]] * 3
    assert forwards == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGpu:
    """What the stand-in above cannot show: capture of a backward, and life after a capture that failed."""

    @pytest.fixture
    def timer(self) -> Timer:
        return Timer(torch.device("cuda", torch.cuda.current_device()))

    @pytest.fixture(autouse=True)
    def no_sync_debug(self) -> None:
        """Leave the real check in place."""

    def test_forward_and_backward_are_captured(self, timer: Timer) -> None:
        with timer.scope():
            x = torch.randn(256, 256, device=timer.device, requires_grad=True)
            w = torch.randn(256, 256, device=timer.device, requires_grad=True)
            grad = torch.randn(256, 256, device=timer.device)
            step = timer.prepare(Calls([forward_backward(lambda: x @ w, [x, w], grad)]))
            backward = timer.prepare(Calls([backward_only(lambda: x @ w, [x, w], grad)]))
            times = timer.interleave({"step": step, "backward": backward}, reps=5)
        assert (step.mode, step.reason) == ("graph", "")
        assert (backward.mode, backward.reason) == ("graph", "")
        assert 0 < times["backward"].median < times["step"].median

    def test_a_host_synchronisation_is_found_before_the_capture(self, timer: Timer) -> None:
        with timer.scope():
            x = torch.randn(8, device=timer.device)
            timed = timer.prepare(Calls([lambda: x.sum().item()]))
        assert timed.mode == "eager"
        assert "synchronises with the host" in timed.reason

    def test_an_invalidated_capture_spoils_nothing_else(self) -> None:
        """Torch leaves its generator and allocator in mid-capture; graphs made before and after must still replay.

        Runs in a process of its own, so that a failure here cannot spoil other tests.
        """
        done = subprocess.run(
            [sys.executable, "-c", _INVALIDATED_CAPTURE], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr


_INVALIDATED_CAPTURE = """
import torch
from bench.case import Calls
from bench.timing import Timer

device = torch.device("cuda", 0)
timer = Timer(device)


def refuses_capture():
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
    return torch.ones(8, device=device)


with timer.scope():
    x = torch.randn(1 << 16, device=device)
    dropout = Calls([lambda: torch.nn.functional.dropout(x, 0.5)])
    before = timer.prepare(dropout)
    failed = timer.prepare(Calls([refuses_capture]))
    torch.randn(8, device=device)
    torch.cuda.empty_cache()
    after = timer.prepare(dropout)
    times = timer.interleave({"before": before, "failed": failed, "after": after}, reps=3)
assert (before.mode, failed.mode, after.mode) == ("graph", "eager", "graph"), (before, failed, after)
assert failed.reason.startswith("capture failed: "), failed.reason
assert all(value.median > 0 for value in times.values())
"""
