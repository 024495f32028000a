"""What a run tells: the metrics file, TensorBoard, and the progress on a terminal."""

from __future__ import annotations

import io
import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from trainers.tiny import losses_of
from transformers import TrainerCallback

from fastpeft.trainers import SFTTrainer
from fastpeft.trainers.metrics import Meter, MetricsFile, Stopwatch
from fastpeft.trainers.progress import ProgressView, format_bytes, format_time

MakeTrainer = Callable[..., SFTTrainer]


def lines_of(trainer: SFTTrainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").open()]


def test_metrics_file_has_a_line_per_event(make_trainer: MakeTrainer, rows: Any) -> None:
    trainer = make_trainer("lora", max_steps=4, logging_steps=2, eval_strategy="steps", eval_dataset=rows[:4])
    trainer.train()
    *lines, last = lines_of(trainer)
    assert [(line["step"], "loss" in line, "eval_loss" in line) for line in lines] == [
        (2, True, False),
        (2, False, True),
        (4, True, False),
        (4, False, True),
    ]
    for line in (lines[0], lines[2]):
        assert line.keys() >= {"epoch", "learning_rate", "grad_norm", "mean_token_accuracy"}
        assert line["tokens_per_second"] > 0 and line["memory_bytes"] > 10**7 and line["skipped_steps"] == 0
    tokens = [sum(len(item["input_ids"]) for item in trainer.train_dataset)]
    assert 0 < lines[0]["num_tokens"] < lines[2]["num_tokens"] < tokens[0]
    assert last["train_loss"] > 0 and "total_flos" not in last


def test_logged_loss_is_the_mean_of_the_steps(make_trainer: MakeTrainer) -> None:
    each, pairs = make_trainer(logging_steps=1), make_trainer(logging_steps=2)
    each.train()
    pairs.train()
    losses = {
        name: [line["loss"] for line in t.state.log_history if "loss" in line]
        for name, t in {"each": each, "pairs": pairs}.items()
    }
    a, b, c, d = losses["each"]
    assert losses["pairs"] == pytest.approx([(a + b) / 2, (c + d) / 2], rel=1e-7)


@pytest.mark.parametrize(("logging_steps", "steps"), [(10, [5]), (5, [5]), (2, [2, 4, 5])])
def test_the_last_step_is_logged_once(logging_steps: int, steps: list[int], make_trainer: MakeTrainer) -> None:
    """A run shorter than logging_steps, 10 by default, showed no loss and left none to plot."""
    each = make_trainer(max_steps=5, logging_steps=1)
    each.train()
    trainer = make_trainer(max_steps=5, logging_steps=logging_steps)
    trainer.train()
    losses = {line["step"]: line["loss"] for line in lines_of(trainer) if "loss" in line}
    assert list(losses) == steps
    averaged = losses_of(each)[steps[-2] if len(steps) > 1 else 0 :]
    assert losses[5] == pytest.approx(sum(averaged) / len(averaged), rel=1e-6)


def test_a_run_ended_early_logs_its_last_step(make_trainer: MakeTrainer) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(max_steps=9, logging_steps=2, callbacks=[Stop()])
    trainer.train()
    assert [line["step"] for line in lines_of(trainer) if "loss" in line] == [2, 3]


def test_logging_by_epoch_or_not_at_all_stays_so(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=3, logging_strategy="no")
    trainer.train()
    assert not losses_of(trainer)


def test_a_new_run_starts_the_file_anew(make_trainer: MakeTrainer, rows: Any) -> None:
    make_trainer(max_steps=3).train()
    again = make_trainer(max_steps=1, eval_dataset=rows[:3])
    again.evaluate()
    again.train()
    assert [(line["step"], "eval_loss" in line) for line in lines_of(again)] == [(0, True), (1, False), (1, False)]


def test_resuming_drops_later_lines_and_one_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)) + '{"step": 2, "lo')
    callback = MetricsFile()
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=2, is_world_process_zero=True)
    callback.on_train_begin(args, state, None)
    state.global_step = 3
    callback.on_log(args, state, None, logs={"loss": math.nan})
    first, second, third = map(json.loads, file.open())
    assert (first["step"], second["step"], third["step"]) == (1, 2, 3)
    assert math.isnan(third["loss"])


def test_tensorboard_gets_the_metrics(make_trainer: MakeTrainer) -> None:
    pytest.importorskip("tensorboard")
    trainer = make_trainer(max_steps=2, report_to=None)
    assert trainer.args.report_to == ["tensorboard"]
    trainer.train()
    (events,) = Path(trainer.args.output_dir).rglob("events.out.tfevents.*")
    content = events.read_bytes()
    for tag in (b"train/loss", b"train/learning_rate", b"train/tokens_per_second"):
        assert tag in content
    assert struct.pack("<f", trainer.state.log_history[0]["loss"]) in content


def test_meter_means_and_totals() -> None:
    meter = Meter(torch.device("cpu"))
    assert meter.read() == {}
    meter.add("loss", torch.tensor(6.0, requires_grad=True), torch.tensor(2))
    meter.add("loss", torch.tensor(3.0), 1)
    meter.add("tokens", 5)
    meter.add("empty", 0.0, 0)
    assert meter.read() == {"loss": 3.0, "tokens": 5.0}
    other = Meter(torch.device("cpu"))
    other.load_state_dict(meter.state_dict())
    meter.reset()
    assert meter.read() == {} and other.read(reduce=lambda packed: packed * 2) == {"loss": 3.0, "tokens": 10.0}


def test_stopwatch_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 6.0, 7.5])  # start, pause, resume, lap, lap
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.paused():
        pass
    assert watch.lap() == 3.0
    assert watch.lap() == 1.5


def test_memory_is_that_of_this_process() -> None:
    """In a process of its own: it is the peak that counts, and tests before may have had a higher one."""
    code = (
        "import torch; from fastpeft.trainers.metrics import memory_bytes; cpu = torch.device('cpu'); "
        "before = memory_bytes(cpu); block = torch.ones(400 * 2**20, dtype=torch.uint8); "
        "print(memory_bytes(cpu) - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 200 * 2**20 < grown < 600 * 2**20


# Progress.


def run_with_console(make_trainer: MakeTrainer, console: Console, **options: Any) -> SFTTrainer:
    trainer = make_trainer(progress=True, **options)
    trainer._progress._console = console
    trainer.train()
    return trainer


def test_plain_lines_where_there_is_no_terminal(make_trainer: MakeTrainer, rows: Any) -> None:
    text = io.StringIO()
    trainer = run_with_console(
        make_trainer,
        Console(file=text),
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=rows[:4],
    )
    first, second, third, fourth, last = text.getvalue().splitlines()
    logged = trainer.state.log_history[0]
    assert first.startswith(f"step 2/4  loss {logged['loss']:.4f}  ")
    assert all(part in first for part in (" tok/s", format_bytes(logged["memory_bytes"]), " left"))
    assert second == f"step 2/4  eval loss {trainer.state.log_history[1]['eval_loss']:.4f}"
    assert third.startswith("step 4/4") and "eval loss" in third and "left" not in third
    assert fourth.startswith("step 4/4  eval loss") and last.startswith("4 steps in 0:0")


def test_one_step_is_not_told_of_in_the_plural(make_trainer: MakeTrainer) -> None:
    text = io.StringIO()
    run_with_console(make_trainer, Console(file=text), max_steps=1)
    assert text.getvalue().splitlines()[-1].startswith("1 step in 0:0")


def test_a_live_table_on_a_terminal(make_trainer: MakeTrainer, rows: Any) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    run_with_console(make_trainer, console, max_steps=3, eval_strategy="steps", eval_dataset=rows[:4])
    screen = text.getvalue()
    assert "\x1b[2K" in screen, "the table is cleared and written again in place"
    last = screen.rsplit("\x1b[2K", 1)[1]
    assert last.count("\n") <= 5
    for part in ("step 3/3", "loss", "eval loss", "lr", "norm", "tok/s", "memory", "weights", "trained", "optimizer"):
        assert part in last
    assert "MFU" not in last and "activations" not in last, "neither is known on a CPU"


def test_terminal_is_given_back_after_an_error(make_trainer: MakeTrainer) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("stop")

    text = io.StringIO()
    with pytest.raises(RuntimeError, match="stop"):
        run_with_console(make_trainer, Console(file=text, force_terminal=True), callbacks=[Fail()])
    assert text.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_quiet_runs_print_nothing(make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(progress=False).train()
    assert capsys.readouterr().out == ""


def test_data_report_is_printed_once(make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(progress=True)
    out = capsys.readouterr().out
    assert out.count("train_dataset: 22 of 22 rows") == 1


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (12_300_000, "12 MB"), (1.94e9, "1.9 GB"), (2.5e12, "2.5 TB")]
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3661.6, "1:01:02")])
def test_format_time(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_plain_lines_tell_a_gpus_memory_once_and_when_it_grows() -> None:
    text = io.StringIO()
    view = ProgressView(Console(file=text, width=200))
    model = torch.nn.Linear(1000, 1000, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = SimpleNamespace(device=torch.device("cuda"))
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=9)
    view.on_train_begin(args, state, None)
    for peak in (50_000_000, 51_000_000, 60_000_000):
        state.global_step += 1
        logs = {"loss": 1.0, "mfu": 0.4125, "memory_bytes": peak}
        view.on_log(args, state, None, logs=logs, model=model, optimizer=optimizer)
    lines = text.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("memory")] == ["memory 50 MB", "memory 60 MB"]
    assert len(lines) == 5 and all("MFU 41.2%" in line for line in lines if line.startswith("step"))
