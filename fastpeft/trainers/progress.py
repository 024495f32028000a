"""The progress of a run for the person watching: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from fastpeft.trainers.memory import memory_by_kind

_UNITS = ("B", "kB", "MB", "GB", "TB")
_BAR_WIDTH = 16
_GROWTH = 1.05  # of the peak, from which on plain lines tell of the memory again
# What is shown of a log line: its key, the name, how the number is written, and a unit for plain lines.
_NUMBERS: tuple[tuple[str, str, Callable[[Any], str], str], ...] = (
    ("loss", "loss", "{:.4f}".format, ""),
    ("eval_loss", "eval loss", "{:.4f}".format, ""),
    ("learning_rate", "lr", "{:.2g}".format, ""),
    ("grad_norm", "norm", "{:.2f}".format, ""),
    ("tokens_per_second", "tok/s", "{:,.0f}".format, "tok/s"),
    ("mfu", "MFU", "{:.1%}".format, ""),
)


class ProgressView(TrainerCallback):
    """Show step, loss, eval loss, learning rate, gradient norm, speed, MFU, memory by kind and time left.

    Numbers are taken from what is logged, and a thread draws the table four times a second, so no step waits.

    Args:
        console: where to; standard output if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        self._start_step = 0
        self._start_time = 0.0
        self._shown: dict[str, Any] = {}
        self._memory: dict[str, int] = {}
        self._peak: int | None = None
        self._told_peak = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, and the live table where there is a terminal."""
        if not state.is_world_process_zero:
            return
        self._start_step, self._start_time = state.global_step, time.perf_counter()
        self._shown, self._memory, self._peak, self._told_peak = {}, {}, None, 0.0
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, get_renderable=lambda: self._table(state))
            self._live.start(refresh=True)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Count the batches of an evaluation for the live table."""
        self._shown["evaluating"] = self._shown.get("evaluating", 0) + 1

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take up new numbers; without a terminal, print them."""
        if not state.is_world_process_zero:
            return
        logs = logs or {}
        self._shown.pop("evaluating", None)
        self._shown.update(logs)
        if "loss" in logs and model is not None and optimizer is not None:
            peak = logs.get("memory_bytes") if args.device.type == "cuda" else None
            if not self._memory or peak != self._peak:  # looking at all parameters takes milliseconds
                self._memory, self._peak = memory_by_kind(model, optimizer, args.device.type, peak), peak
        if self._live is None:
            if "loss" in logs:
                self._print(self._line(state))
                self._tell_memory()
            elif "eval_loss" in logs:
                self._print(f"step {_steps(state)}  eval loss {logs['eval_loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the last table standing and say how long it took."""
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

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _tell_memory(self) -> None:
        """Plain lines tell what a GPU's memory is made of once, and again where a longer batch took more."""
        if self._peak is not None and self._peak > _GROWTH * self._told_peak:
            self._told_peak = self._peak
            self._print(f"memory {format_bytes(self._peak)}: {self._kinds()}")

    def _kinds(self) -> str:
        return ", ".join(f"{kind} {format_bytes(count)}" for kind, count in self._memory.items())

    def _table(self, state: Any) -> Group:
        """A bar, the numbers under their names, and the memory."""
        steps = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, state.max_steps), completed=state.global_step, width=_BAR_WIDTH)
        steps.add_row(bar, Text("  ".join([f"step {_steps(state)}", *self._end(state)])))
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        cells = []
        for key, name, text, _ in _NUMBERS:
            if key in self._shown:
                table.add_column(name, justify="right")
                cells.append(text(self._shown[key]))
        table.add_row(*cells)
        memory = self._shown.get("memory_bytes")
        parts: list[Any] = [steps, *([table] if cells else [])]
        if memory is not None:
            kinds = f": {self._kinds()}" if self._memory else ""
            parts.append(Text(f"memory {format_bytes(memory)}{kinds}"))
        return Group(*parts)

    def _line(self, state: Any) -> str:
        shown = self._shown
        parts = [f"step {_steps(state)}"]
        for key, name, text, unit in _NUMBERS:
            if key in shown:
                parts.append(f"{text(shown[key])} {unit}" if unit else f"{name} {text(shown[key])}")
        if "memory_bytes" in shown:
            parts.append(format_bytes(shown["memory_bytes"]))
        return "  ".join([*parts, *self._end(state)])

    def _end(self, state: Any) -> list[str]:
        """What was skipped, and what is being waited for."""
        shown, parts = self._shown, []
        if shown.get("skipped_steps"):
            parts.append(f"{shown['skipped_steps']} skipped")
        done = state.global_step - self._start_step
        batch = shown.get("evaluating")  # read once: another thread draws than logs
        if batch is not None:
            parts.append(f"evaluating, batch {batch}")
        elif done and state.global_step < state.max_steps:
            seconds = (time.perf_counter() - self._start_time) / done * (state.max_steps - state.global_step)
            parts.append(f"{format_time(seconds)} left")
        return parts


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
