"""The page about runs, and the charts in it."""

from __future__ import annotations

import json
import math
import re
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastpeft.cli import main
from fastpeft.errors import UserError
from fastpeft.recipes import report
from fastpeft.recipes.report import write_report
from fastpeft.recipes.report_chart import Line, line_chart, thinned, ticks

EMPTY = {"meta", "line", "circle", "polyline"}  # elements without an end


class Page(HTMLParser):
    """A page's elements, attributes and text; an element that is closed out of turn is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in EMPTY:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def write_run(folder: Path, scale: float = 1.0, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {
            "step": n,
            "loss": scale * 2 / n,
            "learning_rate": 1e-4,
            "grad_norm": 1.5,
            "memory_bytes": 2_500_000_000,
            "tokens_per_second": 1234.5,
        }
        for n in range(1, 21)
    ]
    rows += [{"step": 10, "eval_loss": scale * 0.3125}, {"step": 20, "eval_loss": scale * 0.75}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings:
        lines = [f"  {key}: {value}\n" for key, value in settings.items()]
        (folder / "config.yaml").write_text("peft:\n  method: lora\ntrain:\n" + "".join(lines))
    return folder


def write_samples(folder: Path) -> None:
    rows = [
        {"step": step, "prompt": "Say <b>", "completion": f"answer\n{step}", "score": 0.5, "kl": 0.25, "tokens": 7}
        for step in (1, 2, 3)
    ]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "pro')


def test_the_file_names_are_those_of_runs():
    from fastpeft.recipes import run_folder
    from fastpeft.trainers import ppo_log

    assert report.CONFIG_FILE == run_folder.CONFIG_FILE
    assert report.COMPLETIONS_FILE == ppo_log.COMPLETIONS_FILE


def test_a_page_stands_alone_and_has_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run(tmp_path / "tea", learning_rate="1e-4", note='"<i> & co"')
    write_samples(run)
    assert write_report(run) == run / "report.html"
    text = (run / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "xlink:href", "data", "action"} & {name for name, _ in page.attributes}
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text
    for name, value in {
        "last step": "20",
        "lowest eval_loss": "0.3125 (step 10)",
        "eval_loss": "0.75",
        "loss": "0.1",
        "memory_bytes": "2.50 GB",
        "tokens_per_second": "1234",
    }.items():
        assert page.cells[page.cells.index(name) + 1] == value, name
    assert page.tags.count("svg") == 4 and page.tags.count("polyline") == 5
    assert 'note: "<i> & co"' in unescape(text) and "<i>" not in text
    assert "answer\n1" in page.cells and "answer\n3" in page.cells and "answer\n2" not in page.cells
    assert "Say <b>" in page.cells


def test_several_runs_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "a" / "out", lr="0.1", seed=7), write_run(tmp_path / "b" / "out", 2, lr="0.2", seed=7)]
    runs.append(write_run(tmp_path / "c" / "out"))
    assert write_report(runs) == Path("report.html")
    page = Page(text := Path("report.html").read_text())
    start = page.cells.index("eval_loss")
    assert page.cells[start : start + 4] == ["eval_loss", "0.75", "1.5", "0.75"]
    start = page.cells.index("train.lr")
    assert page.cells[start : start + 4] == ["train.lr", "0.1", "0.2", ""]
    assert page.cells[:4] == ["", "a/out", "b/out", "c/out"]
    assert "b/out: evaluation loss" in text and "Samples" not in text
    assert page.tags.count("details") == 2, "the third has no settings"
    with pytest.raises(UserError, match="is given twice"):
        write_report([runs[0], runs[0] / "metrics.jsonl"])


def test_only_what_was_logged_is_drawn(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.0}\n{"step": 3, "eval_loss": Infinity}'
    )
    page = Page(write_report(run, tmp_path / "x.html").read_text())
    assert page.tags.count("svg") == 1 and page.tags.count("polyline") == 0 and page.tags.count("circle") == 1
    assert page.cells[page.cells.index("eval_loss") + 1] == "inf"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    run = write_run(tmp_path / "run")
    page = tmp_path / "page.html"

    def plot(*options: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["plot", str(run), "--html", str(page), *options])
        assert not left.value.code
        return capsys.readouterr().out

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        without.setattr("fastpeft.recipes.plot.can_plot", lambda: False)
        assert plot() == f"{page}\n"
    pytest.importorskip("matplotlib")
    assert plot() == f"{page}\n{run / 'loss.png'}\n"
    assert plot("--out", str(tmp_path / "x.png")) == f"{page}\n{tmp_path / 'x.png'}\n"


def test_complaints(tmp_path: Path):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="no run folder was given"):
        write_report([])
    with pytest.raises(UserError, match=r"x\.png names no kind of page; use one of \.html, \.htm"):
        write_report(run, tmp_path / "x.png")
    with pytest.raises(UserError, match=r"run is a folder; name the page's file, such as .*run/report\.html"):
        write_report(run, run)
    with pytest.raises(UserError, match="there is no folder"):
        write_report(run, tmp_path / "absent" / "x.html")
    (tmp_path / "full.html").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"full\.html cannot be written: No space left on device"):
        write_report(run, tmp_path / "full.html")
    (run / "completions.jsonl").write_text('[1]\n{"step": 1, "prompt": "a"}\n')
    with pytest.raises(UserError, match=r"completions\.jsonl:1: not a line of samples"):
        write_report(run)
    (run / "completions.jsonl").unlink()
    (run / "config.yaml").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read as UTF-8 text"):
        write_report(run)
    (run / "config.yaml").write_text("a: [")
    assert "a: [" in write_report(run).read_text(), "settings that are no YAML are shown as they are"


def test_settings_need_not_be_known_to_show(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (run / "completions.jsonl").write_text('{"step": 1, "prompt": "a\\ud800", "completion": "b\\u2028c"}\n')
    assert "b\u2028c" in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 2.1, [0, 0.5, 1, 1.5, 2, 2.5]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (4, 4, [4]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_steps_are_whole_and_within():
    assert ticks(1, 3, 8, least=1) == [1, 2, 3]
    chart = line_chart("loss", [Line("a", {30: 1.0, 130: 0.5})])
    assert re.findall(r'text-anchor="middle">(\d+)<', chart) == ["40", "60", "80", "100", "120"]


def test_a_point_stands_where_its_value_is():
    chart = line_chart("loss", [Line("a", {0: 0.0, 5: 0.5, 10: 1.0})])
    found = re.search(r'points="([^"]*)"', chart)
    assert found
    (x0, y0), (x1, y1), (x2, y2) = [map(float, point.split(",")) for point in found[1].split()]
    assert x0 < x1 < x2 and y0 > y1 > y2, "up is less"
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    lines = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', chart))
    shown = {text: float(y) - 4 for y, text in lines.items()}
    assert shown["0"] == pytest.approx(y0, abs=0.1) and shown["1"] == pytest.approx(y2, abs=0.1)


def test_a_gap_where_a_value_is_no_number():
    chart = line_chart("loss", [Line("a", {1: 1.0, 2: 2.0, 3: math.nan, 4: 1.0, 5: 2.0, 6: math.inf, 7: 1.0})])
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 1


def test_a_long_run_keeps_its_peaks():
    points = dict.fromkeys(range(100_000), 1.0) | {31_337: 50.0, 77_777: -3.0, 60_000: math.nan}
    kept = dict(thinned(points))
    assert len(kept) <= 1100 and kept[31_337] == 50.0 and kept[77_777] == -3.0 and math.isnan(kept[60_000])
    assert 0 in kept and 99_999 in kept
    assert thinned({2: 1.0, 1: 2.0}) == [(1, 2.0), (2, 1.0)]


def test_a_run_that_was_trained(job: Path, capsys: pytest.CaptureFixture[str]):
    for arguments in (["sft", "job.yaml", "train.max_steps=2"], ["plot", "out", "--html", "out.html"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert not left.value.code, capsys.readouterr().err
    page = Page(text := Path("out.html").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert page.cells[page.cells.index("last step") + 1] == "2"
    assert page.cells[page.cells.index("loss") + 1] == f"{[row['loss'] for row in rows if 'loss' in row][-1]:.4g}"
    assert page.tags.count("svg") == 4 and "target_modules" in text
