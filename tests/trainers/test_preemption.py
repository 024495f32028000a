"""SIGTERM and Ctrl-C during training: a checkpoint, the exit code or exception that is expected, and no second wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trainers.tiny import MODELS, assert_equal_weights, losses_of, tiny_lora, weights_of
from transformers import TrainerCallback

from fastpeft.trainers import SFTTrainer
from fastpeft.trainers.checkpoint import list_steps
from fastpeft.trainers.preemption import StopOnSignal

MakeTrainer = Callable[..., SFTTrainer]


class Send(TrainerCallback):
    """Send signals to this process in the third step, one for each event named."""

    def __init__(self, number: signal.Signals, *events: str) -> None:
        for event in events:
            setattr(self, event, self._send)
        self._number = number

    def _send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), self._number)


SIGNALS = [
    pytest.param(signal.SIGTERM, SystemExit, id="SIGTERM"),
    pytest.param(signal.SIGINT, KeyboardInterrupt, id="Ctrl-C"),
]


@pytest.mark.parametrize(("number", "leaves_by"), SIGNALS)
def test_a_signal_saves_and_ends_the_run(
    number: signal.Signals, leaves_by: type[BaseException], make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C used to lose everything since the last checkpoint, which in a short run was all of it."""
    options: dict[str, Any] = {"max_steps": 6}
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    whole = make_trainer(tiny_lora(), "whole", **options)
    whole.train()
    trainer = make_trainer(tiny_lora(), callbacks=[Send(number, "on_step_begin")], **options)
    with pytest.raises(leaves_by) as left:
        trainer.train()
    assert left.value.args == ((143,) if number == signal.SIGTERM else ())
    assert trainer.state.global_step == 3
    assert {each: signal.getsignal(each) for each in before} == before
    assert (
        f"{number.name}: stopped after step 3; saved {Path(trainer.args.output_dir) / 'checkpoint-3'}; to go on from "
        "there, run again with train.resume=true (in Python: trainer.train(resume_from_checkpoint=True))"
    ) in caplog.messages

    resumed = make_trainer(MODELS["lora"](), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))
    assert losses_of(resumed) == losses_of(whole)


def test_the_second_control_c_ends_the_run_at_once(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[Send(signal.SIGINT, "on_step_begin", "on_pre_optimizer_step")])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2 and not list_steps(trainer.args.output_dir)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_during_an_evaluation_saves_the_step_before_it(make_trainer: MakeTrainer, rows: Any) -> None:
    class InEvaluation(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            signal.raise_signal(signal.SIGINT)

    evaluated: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": rows[:4]}
    trainer = make_trainer(callbacks=[InEvaluation()], **evaluated)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert list_steps(trainer.args.output_dir) == [2]


def test_a_signal_at_the_last_step_is_not_lost(make_trainer: MakeTrainer) -> None:
    """And going on from there ends at once: it used to take a step beyond the last, 'step 4/3'."""
    trainer = make_trainer(max_steps=3, callbacks=[Send(signal.SIGTERM, "on_pre_optimizer_step")])
    with pytest.raises(SystemExit):
        trainer.train()
    assert list_steps(trainer.args.output_dir) == [3]
    resumed = make_trainer(max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert_equal_weights(weights_of(trainer.model), weights_of(resumed.model))


def test_a_signal_that_the_process_ignores_stays_ignored(make_trainer: MakeTrainer) -> None:
    """A shell starts what it puts into the background with Ctrl-C ignored, since that is meant for another program."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = make_trainer(callbacks=[Send(signal.SIGINT, "on_step_begin")])
        trainer.train()
        assert trainer.state.global_step == 4 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_the_signals_are_left_alone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(signal.getsignal(signal.SIGINT))

    trainer.add_callback(Look())
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert seen == [before] * 4


def test_a_forked_worker_survives_the_first_control_c_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    """A terminal sends Ctrl-C to the data loader's workers too; without them the step could not be finished."""
    callback = StopOnSignal()
    callback.on_train_begin(SimpleNamespace(world_size=1), SimpleNamespace(), None)
    worker = os.fork()
    if worker == 0:
        signal.raise_signal(signal.SIGINT)
        os._exit(7 if callback.received is None and not caplog.messages else 8)
    _, status = os.waitpid(worker, 0)
    callback.close()
    assert os.waitstatus_to_exitcode(status) == 7
