"""Overfitting, told while it happens: the held-out loss has stopped falling, and the training loss goes on.

What is looked at is the log of the run, which is in every checkpoint; so a resumed run knows what went before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from fastpeft.trainers.checkpoint import checkpoint_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, and the training that led to it.

    Attributes:
        step: when it was.
        loss: of the held-out rows.
        train_loss: mean of the training losses logged since the evaluation before; None where there were none.
    """

    step: int
    loss: float
    train_loss: float | None


@dataclass(frozen=True)
class Overfitting:
    """The best evaluation, and the newest of those that did not come up to it."""

    best: Evaluation
    now: Evaluation
    evaluations: int


def evaluations_of(log: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """Read the evaluations out of a run's log.

    Args:
        log: ``trainer.state.log_history``.
    """
    found: list[Evaluation] = []
    losses: list[float] = []
    for line in log:
        if "eval_loss" in line:
            train_loss = sum(losses) / len(losses) if losses else None
            found.append(Evaluation(int(line["step"]), float(line["eval_loss"]), train_loss))
            losses = []
        elif "loss" in line:
            losses.append(float(line["loss"]))
    return found


def find_overfitting(log: Iterable[Mapping[str, Any]], patience: int) -> Overfitting | None:
    """Whether the held-out loss has been above its best for some evaluations while the training loss fell.

    Args:
        log: ``trainer.state.log_history``.
        patience: evaluations in a row without a new best.
    Returns:
        None also where the training loss has not fallen since: the run is then noisy or diverges, which is another ill.
    """
    evaluations = evaluations_of(log)
    if not evaluations:
        return None
    best = min(range(len(evaluations)), key=lambda index: evaluations[index].loss)  # the first of equals
    since = len(evaluations) - 1 - best
    before, now = evaluations[best].train_loss, evaluations[-1].train_loss
    if since < patience or before is None or now is None or not now < before:
        return None
    return Overfitting(evaluations[best], evaluations[-1], since)


class OverfittingMonitor(TrainerCallback):
    """Say that a run overfits, once for each best evaluation, and stop it if asked."""

    def __init__(self) -> None:
        self._told: int | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the run so far."""
        if args.on_overfitting == "ignore":
            return
        found = find_overfitting(state.log_history, args.overfitting_patience)
        if found is None:
            return
        stops = args.on_overfitting == "stop"
        control.should_training_stop |= stops
        if self._told != found.best.step and state.is_world_process_zero:
            self._told = found.best.step
            logger.warning("%s", _told(found, args.output_dir, stops))


def _told(found: Overfitting, output_dir: str, stops: bool) -> str:
    best, now = found.best, found.now
    folder = checkpoint_path(output_dir, best.step)
    kept = (
        f"the best weights are in {folder}"
        if folder.exists()
        else f"of step {best.step} there is no checkpoint: save as often as you evaluate to keep the best"
    )
    return (
        f"step {now.step}: overfitting: the eval loss has been above its best for {found.evaluations} evaluations "
        f"({best.loss:.4f} at step {best.step}, now {now.loss:.4f}), while the training loss fell from "
        f"{best.train_loss:.4f} to {now.train_loss:.4f}; {kept}. "
        + ("The run ends here (on_overfitting: stop)" if stops else "More steps will not help")
        + "; more or more varied rows would, or a lower rank, more dropout, or a lower learning_rate"
    )
