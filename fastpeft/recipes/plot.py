"""Curves of runs (loss, learning rate, gradient norm, memory) as a picture, from their ``metrics.jsonl``."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError
from fastpeft.recipes.short_names import short_names

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
_FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Panel:
    """A picture of what belongs on one axis.

    Attributes:
        label: of the axis, with the unit.
        series: metrics and what a line of each is called; the second is drawn dashed.
        unit: what the values are divided by.
    """

    label: str
    series: dict[str, str]
    unit: float = 1.0


PANELS = (
    Panel("loss (nats a token)", {"loss": "training loss", "eval_loss": "evaluation loss"}),
    Panel("learning rate", {"learning_rate": "learning rate"}),
    Panel("gradient norm", {"grad_norm": "gradient norm"}),
    Panel("memory (GB)", {"memory_bytes": "memory"}, unit=1e9),
)
_SERIES = tuple(name for panel in PANELS for name in panel.series)


@dataclass
class Curves:
    """The numbers of one run: for each series that is plotted, step -> value, and the last value of every metric."""

    name: str
    series: dict[str, dict[int, float]] = field(default_factory=lambda: {name: {} for name in _SERIES})
    last: dict[str, float] = field(default_factory=dict)


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
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                curves.last[name] = value
                if name in curves.series:
                    curves.series[name][step] = float(value)
    if not curves.series["loss"] and not curves.series["eval_loss"]:
        raise UserError(f"plot: {file} holds no loss yet")
    return curves


def read_runs(run_dirs: Sequence[str | Path]) -> list[Curves]:
    """Read several runs, each called by the end of its path that tells it from the others.

    Args:
        run_dirs: run folders, or metrics files.
    Raises:
        UserError: a run is given twice, or as for `read_curves`.
    """
    runs = [read_curves(folder) for folder in run_dirs]
    folders = [path.parent if (path := Path(given)).is_file() else path for given in run_dirs]
    for run, name in zip(runs, short_names(folders, "plot: the run"), strict=True):
        run.name = name
    return runs


def panels_with_data(runs: Sequence[Curves]) -> list[Panel]:
    """Those of `PANELS` that some run has numbers for."""
    return [panel for panel in PANELS if any(run.series[name] for run in runs for name in panel.series)]


def check_output(out: Path, default: str, kinds: Sequence[str], what: str) -> None:
    """Refuse a file that cannot be written.

    Args:
        out: the file.
        default: a good name for it.
        kinds: endings that it may have.
        what: what it would be.
    Raises:
        UserError: it is a folder, is in none, or has another ending.
    """
    if out.is_dir():
        raise UserError(f"plot: {out} is a folder; name the {what}'s file, such as {out / default}")
    if not out.parent.is_dir():
        raise UserError(f"plot: there is no folder {out.parent} to write {out.name} to")
    if out.suffix.lower() not in kinds:
        raise UserError(f"plot: {out.name} names no kind of {what}; use one of {', '.join(kinds)}")


def plot_run(run_dirs: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Draw losses, learning rate, gradient norm and memory of one run, or of several in one picture.

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
    runs = read_runs(folders)
    if out is None:
        out = PLOT_FILE if len(folders) > 1 else Path(folders[0]) / PLOT_FILE
        if len(folders) == 1 and Path(folders[0]).is_file():
            out = Path(folders[0]).with_name(PLOT_FILE)
    out = Path(out)
    check_output(out, PLOT_FILE, _FORMATS, "picture")

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = panels_with_data(runs)
    heights = [3.0, *(1.0 for _ in panels[1:])]
    figure = Figure(figsize=(8, 4.5 + 1.5 * (len(panels) - 1)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for index, run in enumerate(runs):
            for place, (name, label) in enumerate(panel.series.items()):
                # One colour a run; alone, each series gets its own.
                colour = f"C{index}" if len(runs) > 1 else f"C{_SERIES.index(name)}"
                points = {step: value / panel.unit for step, value in run.series[name].items()}
                looks = {"style": "o--"} if place else {"linewidth": 1.2}
                label = f"{run.name}: {label}" if len(runs) > 1 else label
                _draw(axis, points, color=colour, label=label, **looks)
        axis.set_ylabel(panel.label)
        axis.grid(alpha=0.3)
        axis.set_ylim(*_span(runs, panel))
    axes[0].set_title(", ".join(run.name for run in runs))
    axes[0].legend()
    if panels[1:] and "learning_rate" in panels[1].series:
        axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise UserError(f"plot: {out} cannot be written: {error.strerror or error}") from error
    return out


def _span(runs: Sequence[Curves], panel: Panel) -> tuple[float, float]:
    """Ends of a panel's axis: zero and some air, also below where values are negative, as PPO's loss may be."""
    values = [value for run in runs for name in panel.series for value in run.series[name].values()]
    finite = [value / panel.unit for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    air = 0.06 * (high - low) or 1.0
    return low - air * (low < 0), high + air


def _draw(panel: Any, points: dict[int, float], style: str = "-", **looks: Any) -> None:
    """A line over the steps in order; gaps where a value is not finite, a dot where there is one point only."""
    if points:
        steps = sorted(points)
        values = [points[step] if math.isfinite(points[step]) else math.nan for step in steps]
        panel.plot(steps, values, style if len(steps) > 1 else "o", markersize=4, **looks)
