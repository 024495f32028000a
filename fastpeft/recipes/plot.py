"""Loss curves of runs as a PNG, from the ``metrics.jsonl`` that training writes."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
_FORMATS = (".png", ".svg", ".pdf")
_SERIES = ("loss", "eval_loss", "learning_rate")


@dataclass
class Curves:
    """The plotted numbers of one run: for each series, step -> value."""

    name: str
    series: dict[str, dict[int, float]] = field(default_factory=lambda: {name: {} for name in _SERIES})


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def read_curves(run_dir: str | Path) -> Curves:
    """Read what a run logged.

    Args:
        run_dir: a run folder, or a metrics file itself.
    Returns:
        Its curves. A step logged twice (training was resumed before it) counts as it was logged last.
    Raises:
        UserError: there is no metrics file, it cannot be read, a line of it is not JSON, or no loss was logged yet.
    """
    path = Path(run_dir)
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"plot: {path} is not a run folder: there is no {METRICS_FILE} in it")
    curves = Curves(file.resolve().parent.name)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"plot: {file} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:  # the last for a step of Infinity
            if number == len(lines):
                break  # a run that is being written, or was killed while it wrote
            raise UserError(f"{file}:{number}: not a line of metrics (a JSON object with 'step'): {error}") from error
        for name in _SERIES:
            if isinstance(value := row.get(name), (int, float)):
                curves.series[name][step] = float(value)
    if not curves.series["loss"] and not curves.series["eval_loss"]:
        raise UserError(f"plot: {file} holds no loss yet")
    return curves


def plot_run(run_dirs: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Draw training loss, evaluation loss and learning rate of one run, or of several in one picture.

    Args:
        run_dirs: run folders.
        out: the picture's file; None is ``loss.png`` in the run folder, for several runs in the current folder.
    Returns:
        The picture's file.
    Raises:
        UserError: matplotlib is not installed, a folder holds no metrics, or the picture cannot be written.
    """
    folders = [run_dirs] if isinstance(run_dirs, (str, Path)) else list(run_dirs)
    if not folders:
        raise UserError("plot_run: no run folder was given")
    if not can_plot():
        raise UserError("plot: this needs matplotlib: pip install matplotlib")
    runs = [read_curves(folder) for folder in folders]
    if out is None:
        out = PLOT_FILE if len(folders) > 1 else Path(folders[0]) / PLOT_FILE
        if len(folders) == 1 and Path(folders[0]).is_file():
            out = Path(folders[0]).with_name(PLOT_FILE)
    out = Path(out)
    if out.is_dir():
        raise UserError(f"plot: {out} is a folder; name the picture's file, such as {out / PLOT_FILE}")
    if not out.parent.is_dir():
        raise UserError(f"plot: there is no folder {out.parent} to write {out.name} to")
    if out.suffix.lower() not in _FORMATS:
        raise UserError(f"plot: {out.name} names no kind of picture; use one of {', '.join(_FORMATS)}")

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with_rate = any(run.series["learning_rate"] for run in runs)
    figure = Figure(figsize=(8, 6 if with_rate else 4.5), layout="constrained")
    panels = figure.subplots(
        2 if with_rate else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + with_rate]
    )
    loss_panel, rate_panel = panels[0][0], panels[-1][0]
    for index, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        # One colour a run; alone, the evaluation gets its own.
        train_colour, eval_colour = (f"C{index}", f"C{index}") if len(runs) > 1 else ("C0", "C1")
        _draw(loss_panel, run.series["loss"], color=train_colour, linewidth=1.2, label=f"{prefix}training loss")
        _draw(loss_panel, run.series["eval_loss"], color=eval_colour, style="o--", label=f"{prefix}evaluation loss")
        if with_rate:
            _draw(rate_panel, run.series["learning_rate"], color=f"C{index}" if len(runs) > 1 else "C2", linewidth=1.2)
    loss_panel.set_ylabel("loss (nats a token)")
    loss_panel.set_title(", ".join(run.name for run in runs))
    loss_panel.legend()
    if with_rate:
        rate_panel.set_ylabel("learning rate")
        rate_panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_panel.set_xlabel("step")
    rate_panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (loss_panel, rate_panel):
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=0)
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise UserError(f"plot: {out} cannot be written: {error.strerror or error}") from error
    return out


def _draw(panel: Any, points: dict[int, float], style: str = "-", **looks: Any) -> None:
    """A line over the steps in order; gaps where a value is not finite, a dot where there is one point only."""
    if points:
        steps = sorted(points)
        values = [points[step] if math.isfinite(points[step]) else math.nan for step in steps]
        panel.plot(steps, values, style if len(steps) > 1 else "o", markersize=4, **looks)
