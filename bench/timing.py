"""Times contenders in turns: CUDA-graph replays over rotating inputs on a GPU, perf_counter on a CPU.

What is timed is a pass: every input set of a contender once, repeated until it lasts long enough to measure. The
passes of all contenders alternate, so that a change of clocks or temperature falls on all of them alike. Before each
pass on a GPU a buffer larger than L2 is read: that empties the cache (without leaving writes behind, which the pass
would pay for), and it keeps the device busy while the host enqueues the pass, so that launch latency stays out.

Everything runs on one side stream (`Timer.scope`). Autograd runs a backward on the stream of its forward, so a
backward can be captured only when its forward ran on the capturing stream, which must not be the default one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bench.case import Calls, l2_bytes

_WARMUP_PASSES = 3
_MIN_PASS_US = 1000.0
_MAX_REPEATS = 64
_FLUSH_L2_SIZES = 4


@dataclass(frozen=True)
class Pass:
    """Something to time.

    Attributes:
        run: enqueues the calls (on a CPU: runs them).
        calls: how many calls one run makes.
        mode: ``graph``, ``eager`` (launched from Python, so the host's time is in it) or ``cpu``.
        reason: why it is not a graph; empty when it is, and on a CPU.
        holds: what a graph's replay reads, kept alive: a graph knows addresses only, and once read freed weights.
    """

    run: Callable[[], None]
    calls: int
    mode: Literal["graph", "eager", "cpu"]
    reason: str = ""
    holds: Any = None


@dataclass(frozen=True)
class Times:
    """Microseconds of one call, a value a measured pass."""

    samples_us: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Linear interpolation between the two nearest samples."""
        ordered = sorted(self.samples_us)
        position = percent / 100 * (len(ordered) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    @property
    def p20(self) -> float:
        return self.percentile(20)

    @property
    def median(self) -> float:
        return self.percentile(50)

    @property
    def p80(self) -> float:
        return self.percentile(80)


def forward_backward(
    forward: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> Callable[[], list[Tensor]]:
    """A call that runs a forward and its backward.

    Gradients come from ``torch.autograd.grad``: nothing accumulates into ``.grad``, so the call can be repeated and
    captured, and it returns what it computed.

    Args:
        forward: computes the output from leaves.
        inputs: the leaves to differentiate by.
        grad: gradient of the output.
    Returns:
        A closure giving the output and the gradient of each input.
    """

    def call() -> list[Tensor]:
        out = forward()
        return [out, *torch.autograd.grad(out, inputs, grad)]

    return call


def backward_only(forward: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], list[Tensor]]:
    """A call that runs the backward alone, of a forward that is run here, once.

    Args:
        forward: computes the output from leaves.
        inputs: the leaves to differentiate by.
        grad: gradient of the output.
    Returns:
        A closure giving the gradient of each input.
    """
    out = forward()
    return lambda: list(torch.autograd.grad(out, inputs, grad, retain_graph=True))


class Timer:
    """Prepares and times passes on one device.

    Args:
        device: a CUDA device with its index, or the CPU.
        eager_because: when not empty, nothing is captured, for this reason.
    """

    def __init__(self, device: torch.device, eager_because: str = "") -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._eager_because = eager_because
        if self._cuda:
            self._abandoned: list[torch.cuda.CUDAGraph] = []
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._flush = torch.ones(_FLUSH_L2_SIZES * l2_bytes(device) // 4, device=device)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Make the timer's stream current; inputs, warm-up, capture and timing all belong inside."""
        if not self._cuda:
            yield
            return
        self._stream.wait_stream(torch.cuda.default_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def prepare(self, contender: Calls, eager_because: str = "") -> Pass:
        """Warm a contender up and make a pass of it: a captured graph where that works, Python calls elsewhere.

        Args:
            contender: its calls.
            eager_because: when not empty, do not capture, for this reason.
        Returns:
            The pass, long enough to time.
        """
        calls = list(contender.calls)
        for _ in range(_WARMUP_PASSES):
            _run_all(calls)
        if not self._cuda:
            return Pass(*self._lengthened(calls), mode="cpu")
        reason = self._eager_because or eager_because or contender.eager_because or _synchronises(calls)
        if not reason:
            try:
                return self._captured(calls)
            except Exception as error:  # whatever the contender raises: it is then timed without a graph
                reason = f"capture failed: {_first_cause(error)}"
        return Pass(*self._lengthened(calls), mode="eager", reason=reason)

    def interleave(self, passes: Mapping[str, Pass], reps: int) -> dict[str, Times]:
        """Time every pass ``reps`` times, taking turns.

        Args:
            passes: by the names the result has.
            reps: measured runs of each.
        Returns:
            Microseconds of one call, for each pass.
        """
        for timed in passes.values():
            timed.run()
        samples: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(reps):
            for name, timed in passes.items():
                samples[name].append(self._time_us(timed.run) / timed.calls)
        return {name: Times(tuple(values)) for name, values in samples.items()}

    def peak_bytes(self, contender: Calls) -> int | None:
        """Memory one call allocates on top of what is there already; None on a CPU, where torch does not count it."""
        if not self._cuda:
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        contender.calls[0]()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _time_us(self, run: Callable[[], None]) -> float:
        if not self._cuda:
            start_s = time.perf_counter()
            run()
            return (time.perf_counter() - start_s) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.sum()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    def _lengthened(self, calls: list[Callable[[], Any]]) -> tuple[Callable[[], None], int]:
        """Python calls, repeated until one run lasts long enough, and their count."""
        repeated = calls * _repeats(self._time_us(lambda: _run_all(calls)))
        return (lambda: _run_all(repeated)), len(repeated)

    def _captured(self, calls: list[Callable[[], Any]]) -> Pass:
        graph = self._capture(calls)
        graph.replay()
        repeats = _repeats(self._time_us(graph.replay))
        if repeats > 1:
            graph = self._capture(calls * repeats)
        return Pass(graph.replay, len(calls) * repeats, mode="graph", holds=calls)

    def _capture(self, calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
        """Capture the calls once, with a memory pool and a generator state of their own.

        A capture that the driver invalidates never gets to its end in torch: the generator state stays marked as
        capturing and refuses every later draw and replay, the pool stays open. Own ones keep that from other graphs.
        """
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        self._renew_generator()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                _run_all(calls)
        except Exception:
            self._abandon(graph, pool)
            raise
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        torch.cuda.synchronize(self.device)
        self._renew_generator()
        self._abandoned.append(graph)  # the allocator may keep a pointer to it
        with contextlib.suppress(RuntimeError, AttributeError):  # it is closed already where capture did end
            torch._C._cuda_endAllocateToPool(self.device.index, pool)

    def _renew_generator(self) -> None:
        """Give torch's default generator a state that no graph has seen."""
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(torch.Generator(self.device).manual_seed(torch.initial_seed()))


def _run_all(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def _repeats(pass_us: float) -> int:
    return max(1, min(_MAX_REPEATS, math.ceil(_MIN_PASS_US / max(pass_us, 1e-3))))


def _synchronises(calls: Sequence[Callable[[], Any]]) -> str:
    """Why the calls cannot be captured, as far as torch can tell without trying: a failed capture costs more."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run_all(calls)
    except RuntimeError as error:
        return f"synchronises with the host: {_first_line(error)}"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


def _first_cause(error: BaseException) -> str:
    """The error that came first: a broken capture raises again when it is closed."""
    while error.__context__ is not None:
        error = error.__context__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
