"""The progress of a run for the person watching: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback

_UNITS = ("B", "kB", "MB", "GB", "TB")


class ProgressLine(TrainerCallback):
    """Show step, loss, eval loss, learning rate, gradient norm, speed, memory and time left.

    Args:
        console: where to; standard output if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._start_step = 0
        self._start_time = 0.0
        self._shown: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, and the live line where there is a terminal."""
        if not state.is_world_process_zero:
            return
        self._start_step, self._start_time = state.global_step, time.perf_counter()
        self._shown = {}
        if self._console.is_terminal:
            columns = BarColumn(bar_width=16), TextColumn("{task.description}", markup=False)
            self._live = Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._live.add_task(self._line(state), total=state.max_steps, completed=state.global_step)
            self._live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the live line; the losses in it are those last logged, so nothing waits for the device."""
        self._refresh(state)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Count the batches of an evaluation on the live line."""
        self._shown["evaluating"] = self._shown.get("evaluating", 0) + 1
        self._refresh(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take up new numbers; without a terminal, print them."""
        logs = logs or {}
        self._shown.pop("evaluating", None)
        self._shown.update(logs)
        self._refresh(state)
        if self._live is None and state.is_world_process_zero:
            if "loss" in logs:
                self._print(self._line(state))
            elif "eval_loss" in logs:
                self._print(f"step {_steps(state)}  eval loss {logs['eval_loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the last line standing and say how long it took."""
        self.close()
        if state.is_world_process_zero:
            elapsed = time.perf_counter() - self._start_time
            steps = state.global_step - self._start_step
            self._print(f"{steps} step{'' if steps == 1 else 's'} in {format_time(elapsed)}")

    def close(self) -> None:
        """Give the terminal back; also after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _refresh(self, state: Any) -> None:
        if self._live is not None:
            self._live.update(self._task, completed=state.global_step, description=self._line(state))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _line(self, state: Any) -> str:
        shown = self._shown
        parts = [f"step {_steps(state)}"]
        if "loss" in shown:
            parts.append(f"loss {shown['loss']:.4f}")
        if "eval_loss" in shown:
            parts.append(f"eval loss {shown['eval_loss']:.4f}")
        if "learning_rate" in shown:
            parts.append(f"lr {shown['learning_rate']:.2g}")
        if "grad_norm" in shown:
            parts.append(f"norm {shown['grad_norm']:.2f}")
        if "tokens_per_second" in shown:
            parts.append(f"{shown['tokens_per_second']:,.0f} tok/s")
        if "memory_bytes" in shown:
            parts.append(format_bytes(shown["memory_bytes"]))
        if shown.get("skipped_steps"):
            parts.append(f"{shown['skipped_steps']} skipped")
        done = state.global_step - self._start_step
        if "evaluating" in shown:
            parts.append(f"evaluating, batch {shown['evaluating']}")
        elif done and state.global_step < state.max_steps:
            seconds = (time.perf_counter() - self._start_time) / done * (state.max_steps - state.global_step)
            parts.append(f"{format_time(seconds)} left")
        return "  ".join(parts)


def format_bytes(count: float) -> str:
    """Bytes in the unit that gives one to three digits before the point: ``1.9 GB``."""
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.1f} {unit}" if unit in ("GB", "TB") else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} {_UNITS[-1]}"


def format_time(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _steps(state: Any) -> str:
    return f"{state.global_step}/{state.max_steps}"
