"""SIGTERM or Ctrl-C during training: finish the step, save a checkpoint, and only then leave."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """Turn the first SIGTERM or SIGINT into a checkpoint and an orderly end; the second has its usual effect.

    Schedulers send SIGTERM before they take a machine away; SIGINT is Ctrl-C. The handlers are ours only during
    training in the main thread of a single process. Several processes would have to agree on the step to stop at, so
    there the signals keep their usual effect, and so does a signal that the process was started to ignore.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = 0
        self._finished_step: int | None = None
        self.saved_step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signals."""
        self.received = self._finished_step = self.saved_step = None
        self._process = os.getpid()
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end once a signal has come."""
        self._finished_step = state.global_step
        self._stop_if_received(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same after an evaluation, which may take longer than a step."""
        self._stop_if_received(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same at the last chance to save, which comes after the last step too."""
        self._stop_if_received(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the step is saved."""
        self.saved_step = state.global_step

    def close(self) -> None:
        """Give the signals back; also after an error."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler or signal.SIG_DFL)

    def _stop_if_received(self, state: Any, control: Any) -> None:
        # Only right after a step: an evaluation may come before the first one, where there is nothing to save yet.
        if self.received and state.global_step == self._finished_step:
            control.should_training_stop = True
            if state.global_step != self.saved_step:
                control.should_save = True

    def _on_signal(self, number: int, frame: Any) -> None:
        self.close()
        # The data loader's workers inherit the handler, and a terminal sends Ctrl-C to them too. They have to live on
        # until the step is finished, and to leave the talking to us.
        if os.getpid() != self._process:
            return
        self.received = signal.Signals(number)
        logger.warning(
            "%s: finishing the step and saving a checkpoint; a second signal ends the run at once", self.received.name
        )
