"""What runs did as one HTML page that stands alone: curves, last values, settings, and samples where a run kept some.

The page holds everything it shows: no script, no picture, font or style from elsewhere. It follows the reader's choice
of light or dark. Needs neither torch nor matplotlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

import fastpeft
from fastpeft.errors import UserError
from fastpeft.recipes.plot import Curves, check_output, panels_with_data, read_runs
from fastpeft.recipes.report_chart import COLOURS, Line, line_chart

REPORT_FILE = "report.html"
CONFIG_FILE = "config.yaml"
COMPLETIONS_FILE = "completions.jsonl"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6270; --paper: #fff; --line: #dfe2e8; --box: #f5f6f8;
  --c0: #2563c4; --c1: #c2500a; --c2: #1a7f4b; --c3: #b3266e; --c4: #6d4bc4; --c5: #0e7d8c; --c6: #8a6a00; --c7: #555; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --soft: #a3aab8; --paper: #15171a; --line: #343941;
  --box: #1e2126; --c0: #7aa8ff; --c1: #ff9d5c; --c2: #5fd394; --c3: #ff86bd; --c4: #b59cff; --c5: #58cfe0;
  --c6: #e3bf4a; --c7: #bbb; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.5em; margin: 0; } h2 { font-size: 1.15em; margin: 2em 0 .5em; }
p.soft { color: var(--soft); margin: 0; }
figure { margin: 1em 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } .grid { stroke: var(--line); }
polyline { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; }
polyline.dashed { stroke-dasharray: 5 4; } circle { fill: currentColor; }
.legend { margin: 0; font-size: .85em; } .key { display: inline-block; margin-right: 1.4em; }
.key::before { content: ""; display: inline-block; width: 1.6em; margin-right: .4em; vertical-align: middle;
  border-top: 2px solid currentColor; } .key.dashed::before { border-top-style: dashed; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9em; }
th, td { text-align: left; vertical-align: top; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre, .text { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: var(--box); padding: 10px 12px; border-radius: 6px; font-size: .85em; }
summary { cursor: pointer; font-weight: 600; }
""" + "\n".join(f".c{number} {{ color: var(--c{number}); }}" for number in range(COLOURS))


def write_report(run_dirs: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a page about one run, or about several beside each other.

    Args:
        run_dirs: run folders.
        out: the page's file; None is ``report.html`` in the run folder, for several runs in the current folder.
    Returns:
        The page's file.
    Raises:
        UserError: a folder holds no metrics, one of its files cannot be read, or the page cannot be written.
    """
    given = [run_dirs] if isinstance(run_dirs, (str, Path)) else list(run_dirs)
    if not given:
        raise UserError("plot: no run folder was given")
    runs = read_runs(given)
    folders = [path.parent if (path := Path(each)).is_file() else path for each in given]
    if out is None:
        out = folders[0] / REPORT_FILE if len(folders) == 1 else REPORT_FILE
    out = Path(out)
    check_output(out, REPORT_FILE, (".html", ".htm"), "page")
    page = _page(runs, folders)
    try:
        out.write_text(page, encoding="utf-8", errors="replace")  # a completion may hold half of a surrogate pair
    except OSError as error:
        raise UserError(f"plot: {out} cannot be written: {error.strerror or error}") from error
    return out


def _page(runs: Sequence[Curves], folders: Sequence[Path]) -> str:
    title = escape(", ".join(run.name for run in runs))
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="soft">{"a run" if len(runs) == 1 else f"{len(runs)} runs"} of fastpeft {fastpeft.__version__}</p>',
        "<h2>Curves</h2>",
        *_charts(runs),
        "<h2>Last values</h2>",
        _last_values(runs),
        *_settings(runs, [_read(folder / CONFIG_FILE) for folder in folders]),
        *_samples(runs, folders),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n"
        "</body>\n</html>\n"
    )


def _charts(runs: Sequence[Curves]) -> list[str]:
    charts = []
    for panel in panels_with_data(runs):
        lines = [
            Line(
                f"{run.name}: {label}" if len(runs) > 1 else label,
                {step: value / panel.unit for step, value in run.series[name].items()},
                index % COLOURS if len(runs) > 1 else place,
                dashed=place > 0,
            )
            for index, run in enumerate(runs)
            for place, (name, label) in enumerate(panel.series.items())
        ]
        charts.append(line_chart(panel.label, lines))
    return charts


def _last_values(runs: Sequence[Curves]) -> str:
    """A row for each metric that some run logged, and before them the last step and the best evaluation."""
    rows = [["last step", *(str(max(step for points in run.series.values() for step in points)) for run in runs)]]
    if any(run.series["eval_loss"] for run in runs):
        rows.append(["lowest eval_loss", *(_lowest(run.series["eval_loss"]) for run in runs)])
    for name in dict.fromkeys(name for run in runs for name in run.last if name != "step"):
        rows.append([name, *(_number(name, run.last[name]) if name in run.last else "" for run in runs)])
    return _table(["", *(run.name for run in runs)], rows, numbers=True)


def _lowest(points: dict[int, float]) -> str:
    finite = {step: value for step, value in points.items() if math.isfinite(value)}
    if not finite:
        return ""
    step = min(finite, key=lambda each: finite[each])
    return f"{_number('eval_loss', finite[step])} (step {step})"


def _number(name: str, value: float) -> str:
    if name.endswith("_bytes") and math.isfinite(value):
        return f"{value / 1e9:.2f} GB"
    return f"{value:,d}" if isinstance(value, int) else f"{value:.4g}"


def _settings(runs: Sequence[Curves], texts: Sequence[str | None]) -> list[str]:
    """Each run's config.yaml, and of several the values that differ in a table before them."""
    if not any(texts):
        return []
    parts = ["<h2>Settings</h2>"]
    flat = [dict(_flat(_loaded(text))) for text in texts]
    rows = []
    for key in dict.fromkeys(key for values in flat for key in values):
        told = [values.get(key, "") for values in flat]
        if len(set(told)) > 1:
            rows.append([key, *told])
    if rows:
        parts.append(_table(["differing", *(run.name for run in runs)], rows))
    for run, text in zip(runs, texts, strict=True):
        if text is not None:
            opened = " open" if len(runs) == 1 else ""
            summary = f"<summary>{escape(run.name)}/{CONFIG_FILE}</summary>"
            parts.append(f"<details{opened}>{summary}<pre>{escape(text.strip())}</pre></details>")
    return parts


def _loaded(text: str | None) -> Any:
    """The settings of a text; nothing where it is no YAML, which the page shows as it is all the same."""
    try:
        return yaml.safe_load(text or "")
    except yaml.YAMLError:
        return None


def _flat(value: Any, key: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str)


def _samples(runs: Sequence[Curves], folders: Sequence[Path]) -> list[str]:
    """What a policy said at its first and its last logged update."""
    parts: list[str] = []
    for run, folder in zip(runs, folders, strict=True):
        rows = _completions(folder / COMPLETIONS_FILE)
        steps = sorted({row["step"] for row in rows})
        shown = [row for row in rows if row["step"] in (steps[0], steps[-1])]
        if not shown:
            continue
        columns = [name for name in ("step", "prompt", "completion", "score", "kl", "tokens") if name in shown[0]]
        cells = [[_cell(name, row.get(name, "")) for name in columns] for row in shown]
        heading = f"Samples of {run.name}" if len(runs) > 1 else "Samples"
        parts += [f"<h2>{escape(heading)}</h2>", _table(columns, cells)]
    return parts


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    return _number(name, value) if isinstance(value, (int, float)) else json.dumps(value, ensure_ascii=False)


def _completions(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    # Not splitlines: JSON as it is written here leaves characters such as U+2028 as they are.
    lines = (_read(path) or "").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if number == len(lines):
                break  # a run that is being written, or was killed while it wrote
            raise UserError(f"{path}:{number}: not a line of samples (a JSON object with 'step'): {error}") from error
    return rows


def _read(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"plot: {path} cannot be read as UTF-8 text: {error}") from error


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """A table whose first column names the rows; texts keep their line breaks."""
    kind = "number" if numbers else "text"
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + f"<td>{escape(first)}</td>" + "".join(f'<td class="{kind}">{escape(x)}</td>' for x in rest) + "</tr>\n"
        for first, *rest in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
