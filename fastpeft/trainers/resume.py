"""What a resumed run takes from its settings of now, where transformers would go on with those of the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

_TRANSFORMERS_LOGGER = "transformers.trainer_utils"
_MISMATCH = "Warning: The following arguments do not match"


class AlreadyTrained(Exception):
    """The checkpoint is at the last step of the run or beyond it; its weights are loaded.

    Args:
        step: where the checkpoint is.
        max_steps: how many steps the settings ask for.
    """

    def __init__(self, step: int, max_steps: int) -> None:
        super().__init__(f"already at step {step} of {max_steps}")


class ResumeAsAsked(TrainerCallback):
    """Use the ``logging_steps``, ``eval_steps`` and ``save_steps`` of now, and stop a run that has nothing to do.

    transformers restores the three from the checkpoint's state. It would also train one step more where the checkpoint
    is at the last step already and that step is not an epoch's last.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called once the checkpoint is loaded.

        Raises:
            AlreadyTrained: no step is left to do.
        """
        if not state.global_step:
            return
        if state.global_step >= state.max_steps:
            raise AlreadyTrained(state.global_step, state.max_steps)
        state.compute_steps(args, state.max_steps)
        if state.train_batch_size != args.train_batch_size and state.is_world_process_zero:
            logger.warning(
                "resuming with per_device_train_batch_size %d after %d; the rows of this epoch that were trained on "
                "are counted as if they had come in batches of the new size",
                args.train_batch_size,
                state.train_batch_size,
            )
            state.train_batch_size = args.train_batch_size


@contextmanager
def without_mismatch_warning() -> Iterator[None]:
    """Keep back transformers' warning that settings differ from the checkpoint's: `ResumeAsAsked` sees to them."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_MISMATCH)

    noisy = logging.getLogger(_TRANSFORMERS_LOGGER)
    noisy.addFilter(is_other)
    try:
        yield
    finally:
        noisy.removeFilter(is_other)
