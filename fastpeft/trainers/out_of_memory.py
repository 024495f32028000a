"""A step that runs out of GPU memory is run once more with the optimizer's state out of its way.

Paged optimizers hold state on the GPU that can wait in host memory instead (`fastpeft.optim.PagedAdamW.evict`). When
memory runs out in a micro-batch, all of it moves there, and the micro-batches since the last optimizer step run again,
each with the random numbers and from the sums it began with, so that gradients and metrics are those of a step that had
room. What has room comes back at the next optimizer step. A gradient that was half accumulated cannot be told from a
whole one, which is why the step starts over and not the micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.trainers.metrics import Meter
from fastpeft.trainers.state import capture_rng, restore_rng

logger = logging.getLogger(__name__)

_ADVICE = (
    "lower per_device_train_batch_size and raise gradient_accumulation_steps (same loss), take shorter rows, switch "
    "gradient_checkpointing on"
)


@dataclass
class StepAgain:
    """Runs micro-batches, and those of a whole step again when memory runs out.

    Attributes:
        meter: what they add their metrics to.
        processes: how many train together: a process that starts over alone would wait for the others for ever.
    """

    meter: Meter
    processes: int
    _done: list[Callable[[], Tensor]] = field(default_factory=list)  # micro-batches since the last optimizer step
    _rng: Any = None  # when the first of them began
    _metrics: Any = None

    def run(self, micro_batch: Callable[[], Tensor], model: nn.Module, optimizer: Any, first: bool) -> Tensor:
        """Run a micro-batch, forward and backward.

        Args:
            micro_batch: what to run; gradients add up in the model's parameters.
            model: whose gradients these are.
            optimizer: the one that is stepped, or accelerate's wrapper of it.
            first: whether it is the first since the last optimizer step.
        Returns:
            What ``micro_batch`` returns.
        Raises:
            UserError: there was not enough memory, and moving the optimizer's state out did not help.
        """
        evict: Callable[[], int] | None = getattr(getattr(optimizer, "optimizer", optimizer), "evict", None)
        if first:
            self._done.clear()
            if evict is not None:
                self._rng, self._metrics = capture_rng(), self.meter.state_dict()
        try:
            loss = micro_batch()
        except torch.OutOfMemoryError as error:
            told = _first_sentence(error)  # the error itself holds on to the activations
            if evict is None or self.processes > 1:
                hint = "optim_device_budget_gb: 0" if evict else "optimizer: paged_adamw_8bit"
                raise UserError(f"the GPU's memory ran out ({told}); {_ADVICE}, or set {hint}") from error
        else:
            if evict is not None:
                self._done.append(micro_batch)
            return loss
        return self._again(micro_batch, model, evict, told)

    def _again(
        self, micro_batch: Callable[[], Tensor], model: nn.Module, evict: Callable[[], int], told: str
    ) -> Tensor:
        model.zero_grad(set_to_none=True)
        moved = evict()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "the GPU's memory ran out (%s); %.3g GB of the optimizer's state moved to host memory, and the step starts "
            "over; to have it there from the start, lower optim_device_budget_gb",
            *(told, moved / 1e9),
        )
        restore_rng(self._rng)
        self.meter.load_state_dict(self._metrics)
        try:
            for earlier in self._done:
                earlier()
            loss = micro_batch()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory ran out ({_first_sentence(error)}), also with all of the optimizer's state in host "
                f"memory; {_ADVICE}"
            ) from error
        self._done.append(micro_batch)
        return loss


def _first_sentence(error: BaseException) -> str:
    """What was asked for, without torch's advice on its allocator."""
    return ". ".join(str(error).split(". ")[:2]).strip().rstrip(".")
