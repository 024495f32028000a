"""Overfitting is told, with where the best weights are, and stops a run if asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastpeft.errors import UserError
from fastpeft.trainers import SFTConfig, SFTTrainer
from fastpeft.trainers.overfitting import Evaluation, find_overfitting

MakeTrainer = Callable[..., SFTTrainer]

# The held-out rows answer the same prompts otherwise: the better the training rows are known, the worse these.
TRAIN = [{"input": f"{i}+{i} =", "output": str(2 * i)} for i in range(8)]
HELD_OUT = [{"input": f"{i}+{i} =", "output": str(90 - 7 * i)} for i in range(8)]


def log(*parts: float | Sequence[float]) -> list[dict[str, Any]]:
    """A run's log: a number is an eval loss, a list the training losses since the one before."""
    lines: list[dict[str, Any]] = []
    for step, part in enumerate(parts):
        if isinstance(part, Sequence):
            lines += [{"step": step, "loss": loss, "learning_rate": 1e-4} for loss in part]
        else:
            lines.append({"step": step, "eval_loss": part, "eval_runtime": 1.0})
    return lines


def test_the_held_out_loss_rises_while_the_training_loss_falls() -> None:
    lines = log([3.0, 2.0], 2.5, [1.9, 1.7], 2.2, [1.5], 2.3, [1.2], 2.25, [0.8, 0.6], 2.4)
    assert find_overfitting(lines[:-3], 3) is None
    found = find_overfitting(lines, 3)
    assert found is not None and found.evaluations == 3
    assert found.best == Evaluation(3, 2.2, pytest.approx(1.8)) and found.now == Evaluation(9, 2.4, pytest.approx(0.7))
    assert find_overfitting(lines, 4) is None


@pytest.mark.parametrize(
    "lines",
    [
        [],
        log([3.0]),
        log(2.0, 2.5, 2.6, 2.7),  # nothing is known of the training
        log([1.0], 2.0, [1.1], 2.5, [1.2], 2.6, [1.3], 2.7),  # the training loss rises too
        log([3.0], 2.0, [2.0], 2.5, [1.0], 2.6, [0.5], 1.9),  # a new best
        log([3.0], 2.0, [2.0], 2.0, [1.0], 2.0),  # two are too few, and none is above
    ],
    ids=["empty", "no-evaluation", "no-training-loss", "diverges", "new-best", "too-few"],
)
def test_other_courses_are_no_overfitting(lines: list[dict[str, Any]]) -> None:
    assert find_overfitting(lines, 3) is None


def run(make_trainer: MakeTrainer, steps: int = 60, resume: bool = False, **options: Any) -> SFTTrainer:
    settings = {
        "train_dataset": TRAIN,
        "eval_dataset": HELD_OUT,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 5,
        "save_total_limit": 1,
    }
    trainer: SFTTrainer = make_trainer("full", max_steps=steps, **{**settings, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_says_so_once_and_keeps_the_best(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = run(make_trainer)
    (said,) = [record.getMessage() for record in caplog.records if "overfitting" in record.getMessage()]
    best = trainer.state.best_global_step
    assert f"at step {best}, now " in said and f"the best weights are in {tmp_path / 'run'}/checkpoint-{best}" in said
    assert trainer.state.global_step == 60
    assert (tmp_path / f"run/checkpoint-{best}").is_dir() and (tmp_path / "run/checkpoint-60").is_dir()


def test_a_run_stops_if_asked_and_not_before(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = run(make_trainer, on_overfitting="stop", overfitting_patience=2)
    assert trainer.state.best_global_step is not None
    assert trainer.state.global_step == trainer.state.best_global_step + 2 * 5
    assert (tmp_path / f"run/checkpoint-{trainer.state.global_step}").is_dir()


def test_ignored_if_asked(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(make_trainer, on_overfitting="ignore")
    assert "overfitting" not in caplog.text


def test_a_resumed_run_knows_what_went_before(make_trainer: MakeTrainer) -> None:
    """Stopped one evaluation short of the patience; the one after the resumption is the last."""
    whole = run(make_trainer, folder="whole", on_overfitting="stop", overfitting_patience=2)
    end = whole.state.global_step
    run(make_trainer, folder="cut", steps=end - 5, on_overfitting="stop", overfitting_patience=2)
    resumed = run(make_trainer, folder="cut", resume=True, on_overfitting="stop", overfitting_patience=2)
    assert resumed.state.global_step == end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_overfitting": "halt"}, "on_overfitting is 'halt'; it must be one of warn, stop, ignore"),
        ({"overfitting_patience": 0}, "overfitting_patience is 0; it must be a whole number of 1 or more"),
    ],
)
def test_refuses(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        SFTConfig(output_dir=str(tmp_path), **options)
