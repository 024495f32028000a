"""Loss curves from metrics files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from fastpeft.errors import UserError
from fastpeft.recipes import plot_run
from fastpeft.recipes.plot import METRICS_FILE, PANELS, Curves, _span, panels_with_data, read_curves, read_runs

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder: Path, steps: int = 20) -> Path:
    folder.mkdir()
    rows = [
        {"step": n, "epoch": n / 10, "loss": 2 * math.exp(-n / 5), "learning_rate": 1e-4, "grad_norm": 1.0}
        for n in range(1, steps + 1)
    ]
    rows += [{"step": n, "eval_loss": 2 * math.exp(-n / 6)} for n in range(10, steps + 1, 10)]
    rows.append({"step": steps, "train_runtime": 1.0, "train_loss": 0.5})
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_file_name_is_the_trainers():
    from fastpeft.trainers import metrics

    assert metrics.METRICS_FILE == METRICS_FILE


def test_one_run(tmp_path: Path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run")
    assert plot_run(run) == run / "loss.png"
    assert (run / "loss.png").read_bytes()[:8] == PNG
    assert plot_run(run, tmp_path / "x.png") == tmp_path / "x.png"
    assert plot_run(run / METRICS_FILE) == run / "loss.png"


def test_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=1)]
    assert plot_run(runs) == Path("loss.png")
    assert Path("loss.png").read_bytes()[:8] == PNG
    assert not (tmp_path / "a" / "loss.png").exists()


def test_curves(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=10)
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 10, "loss": 0.125}\n{"step": 11, "loss": NaN}\n{"step": 12, "lo')
    curves = read_curves(run)
    assert curves.name == "run"
    assert len(curves.series["loss"]) == 11
    assert curves.series["loss"][10] == 0.125, "the later line of a step counts"
    assert math.isnan(curves.series["loss"][11])
    assert list(curves.series["eval_loss"]) == [10]


def test_complaints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"empty is not a run folder: there is no metrics\.jsonl in it"):
        (tmp_path / "empty").mkdir()
        plot_run(tmp_path / "empty")
    run = tmp_path / "run"
    run.mkdir()
    (run / METRICS_FILE).write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no loss yet"):
        plot_run(run)
    (run / METRICS_FILE).write_text('{"step": 1, "loss": 1.0}\n{"loss": 1.0}\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of metrics"):
        plot_run(run)
    with pytest.raises(UserError, match="no run folder"):
        plot_run([])
    good = write_run(tmp_path / "good")
    with pytest.raises(UserError, match="there is no folder"):
        plot_run(good, tmp_path / "absent" / "x.png")
    with pytest.raises(UserError, match=r"x\.gift names no kind of picture; use one of \.png, \.svg, \.pdf"):
        plot_run(good, tmp_path / "x.gift")
    with pytest.raises(UserError, match=r"good is a folder; name the picture's file, such as .*good/loss\.png"):
        plot_run(good, good)
    (tmp_path / "full.png").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"full\.png cannot be written: No space left on device"):
        plot_run(good, tmp_path / "full.png")
    (run / METRICS_FILE).write_bytes(b'{"step": 1, "name": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read as UTF-8 text: .* 0xe9"):
        plot_run(run)
    (run / METRICS_FILE).write_text('{"step": Infinity, "loss": 1.0}\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a line of metrics"):
        plot_run(run)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot_run(good)


def test_an_axis_holds_every_value():
    """Memory that hardly moves lay on the upper edge, and a negative loss was cut off at zero."""
    run = Curves("run")
    run.series["memory_bytes"] = {1: 9.0e9, 2: 9.1e9}
    run.series["loss"] = {1: 0.5, 2: -0.5, 3: math.nan}
    low, high = _span([run], PANELS[3])
    assert low == 0 and 9.2 < high < 10
    low, high = _span([run], PANELS[0])
    assert -0.6 < low < -0.5 and 0.5 < high < 0.6


def test_last_values_and_panels(tmp_path: Path):
    (tmp_path / "a").mkdir()
    run = write_run(tmp_path / "a" / "run")
    curves = read_curves(run)
    assert curves.last["train_loss"] == 0.5 and curves.last["epoch"] == 2.0
    assert [panel.label for panel in panels_with_data([curves])] == [
        "loss (nats a token)",
        "learning rate",
        "gradient norm",
    ]
    (tmp_path / "b").mkdir()
    other = write_run(tmp_path / "b" / "run")
    assert [each.name for each in read_runs([run, other / METRICS_FILE])] == ["a/run", "b/run"]
