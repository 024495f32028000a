"""SIGTERM during training: finish the step, save a checkpoint, leave with exit code 143."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM


class StopOnSigterm(TrainerCallback):
    """Turn SIGTERM, which schedulers send before they take a machine away, into a checkpoint and an orderly end.

    The signal's handler is ours only during training in the main thread of a single process. Several processes would
    have to agree on the step to stop at, so there the signal keeps its usual effect.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: Any = None
        self._installed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signal."""
        self.received = False
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end once the signal has come."""
        if self.received:
            control.should_save = True
            control.should_training_stop = True

    def close(self) -> None:
        """Give the signal back; also after an error."""
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
            self._installed = False

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received = True
        logger.warning("SIGTERM: finishing the step and saving a checkpoint; a second SIGTERM ends the process at once")
        self.close()
