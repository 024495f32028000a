"""Numbers about a run: sums kept on the device, time without pauses, memory, and the file they end up in."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

METRICS_FILE = "metrics.jsonl"


class Meter:
    """Weighted means and totals that stay on the device until they are read, so that adding never waits for a GPU.

    Args:
        device: where the values to add live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float, weight: Tensor | float | None = None) -> None:
        """Add to a metric.

        Args:
            name: the metric.
            value: a sum over ``weight`` things, or an amount to total.
            weight: what the mean divides by; None for a metric that is a total.
        """
        self._accumulate(self._sums, name, value)
        if weight is not None:
            self._accumulate(self._weights, name, weight)

    def read(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Give every mean and total since the last `reset`; one transfer from the device.

        Args:
            reduce: sums a float64 ``(n,)`` tensor over the processes, when there are several.
        Returns:
            Values by name; a mean over nothing is left out.
        """
        if not self._sums:
            return {}
        packed = torch.stack([*self._sums.values(), *self._weights.values()])
        numbers: list[float] = (packed if reduce is None else reduce(packed)).tolist()
        sums = dict(zip(self._sums, numbers, strict=False))
        weights = dict(zip(self._weights, numbers[len(sums) :], strict=True))
        return {name: value / weights.get(name, 1.0) for name, value in sums.items() if weights.get(name) != 0.0}

    def reset(self) -> None:
        """Start again from nothing."""
        self._sums, self._weights = {}, {}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What was added since the last reset, for a checkpoint; adding more does not change it."""
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go on from a `state_dict`."""
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}
        self._weights = {name: value.to(self._device) for name, value in state["weights"].items()}

    def _accumulate(self, table: dict[str, Tensor], name: str, amount: Tensor | float) -> None:
        if name not in table:
            table[name] = torch.zeros((), dtype=torch.float64, device=self._device)
        table[name] = table[name] + (amount.detach() if isinstance(amount, Tensor) else amount)


class Stopwatch:
    """Seconds between laps, without what `paused` surrounds."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap (or the making); starts the next one."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the lap."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - begin


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on a GPU; on a CPU the bytes of memory the process occupies now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak is all there is, in bytes on macOS and in KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return pages * os.sysconf("SC_PAGE_SIZE")


class LogLastStep(TrainerCallback):
    """Log what came since the last log line when a run ends, which may be before ``logging_steps`` have passed."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a line at the last of all steps, before the evaluation and the checkpoint of that step."""
        if args.logging_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a line where something else has ended the run; transformers passes over a step that has one."""
        if args.logging_strategy == IntervalStrategy.STEPS and control.should_training_stop:
            control.should_log = True


class MetricsFile(TrainerCallback):
    """Append every log event to ``output_dir/metrics.jsonl``, one JSON object a line.

    A resumed run keeps the lines up to the step it resumes from and goes on after them; a new run starts the file
    anew. A number that is not finite is written as Python's json module does: ``NaN``, ``Infinity``.
    """

    def __init__(self) -> None:
        self._session: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the lines of a course that this run does not continue."""
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS_FILE
        kept = []
        if state.global_step and path.exists():
            earlier = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in earlier if line not in self._session and _step(line) <= state.global_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{METRICS_FILE}.partial")
        partial.write_text("".join([*kept, *self._session]), encoding="utf-8")
        partial.replace(path)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line."""
        if not state.is_world_process_zero:
            return
        self._session.append(append_metrics(Path(args.output_dir), state.global_step, logs or {}))


def append_metrics(folder: Path, step: int, values: Mapping[str, Any]) -> str:
    """Append a line to a run's metrics file.

    Args:
        folder: the run's.
        step: after which the values were taken.
        values: numbers by name.
    Returns:
        The line.
    """
    line = json.dumps({"step": step, **values}, default=float) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(line)
    return line


def _step(line: str) -> float:
    """The step of a line; infinite, so that the line goes, where it was cut off in writing."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
