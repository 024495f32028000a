"""Reward models: a score for a prompt with its answer, learnt from which answers people prefer.

The score is a linear function of the hidden state at the answer's last token, its end token. Every answer of a ranking
is computed once, and all its pairs are learnt in one batch (InstructGPT, arXiv 2203.02155, section 3.5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, PeftModel
from fastpeft.trainers.forward import batch_hidden
from fastpeft.trainers.heads import get_reward_model, has_score, scores_of
from fastpeft.trainers.losses import reward_loss
from fastpeft.trainers.metrics import Meter
from fastpeft.trainers.preference import PreferenceConfig, PreferenceTrainer, Source

_BINS = (0.5, 0.6, 0.7, 0.8, 0.9)  # lower ends of bins of the probability that a model gives the answer it prefers


@dataclass
class RewardConfig(PreferenceConfig):
    """Options of `RewardTrainer`: those of `PreferenceConfig`, and the loss.

    Args:
        center_rewards_coefficient: pull of the scores towards a mean of 0; None for none.
    Raises:
        UserError: a value out of range.
    """

    learning_rate: float = 1e-4
    center_rewards_coefficient: float | None = field(default=None, metadata={"help": "pull of scores towards 0"})

    def __post_init__(self) -> None:
        if self.center_rewards_coefficient is not None and not self.center_rewards_coefficient >= 0:
            self._refuse("center_rewards_coefficient", "it must be 0 or more")
        super().__post_init__()


class RewardTrainer(PreferenceTrainer):
    """Train a reward model on pairs and rankings.

    Metrics: ``accuracy`` (share of pairs in the right order), ``margin``, ``min_reward``, ``mean_reward``,
    ``max_reward``; in evaluation also the calibration, the share of right orders among the pairs whose better-scored
    answer the model takes to be preferred with a probability of 50 to 60%, 60 to 70%, ...
    (``calibration/0.5``, ...), and ``calibration_error``, their mean distance from the probabilities.

    Args:
        model: a causal language model, or one from `fastpeft.trainers.get_reward_model`, or one of transformers for
            sequence classification with one label.
        args: options; ``RewardConfig()`` if None.
        train_dataset: a JSON Lines file, rows in memory, or a `PreferenceDataset`.
        eval_dataset: the same.
        processing_class: the tokenizer.
        data_collator: takes the place of `PreferenceCollator`.
        callbacks: further transformers callbacks.
        optimizers: an optimizer and a scheduler to use in place of those that ``args`` describe.
        peft_config: an adapter to make, with a score layer of its own; None trains what is trainable.
    Raises:
        UserError: data, tokenizer or model cannot be used; the message says what to do.
    """

    args: RewardConfig

    def __init__(
        self,
        model: nn.Module,
        args: RewardConfig | None = None,
        train_dataset: Source | None = None,
        eval_dataset: Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: LoraConfig | None = None,
    ) -> None:
        args = RewardConfig() if args is None else args
        if peft_config is not None and isinstance(model, PeftModel):
            raise UserError(
                "RewardTrainer: the model has an adapter and peft_config asks for another; give one of them"
            )
        if isinstance(model, nn.Module) and not isinstance(model, PeftModel):
            model = get_reward_model(model, peft_config, args.seed)
        elif isinstance(model, PeftModel) and not has_score(model):
            raise UserError(
                "RewardTrainer: the model's adapter has no score layer to train; give the model without an adapter and "
                "the adapter as peft_config=, or make it with fastpeft.trainers.get_reward_model"
            )
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def pair_losses(self, model: nn.Module, inputs: dict[str, Tensor], meter: Meter) -> Tensor:
        """Bradley-Terry losses of the batch's pairs."""
        scores = self.scores(model, inputs)
        chosen, rejected = scores[inputs["pairs"]].unbind(1)
        losses = reward_loss(chosen, rejected, inputs.get("margins"), self.args.center_rewards_coefficient or 0.0)
        with torch.no_grad():
            margin = chosen - rejected
            meter.add("accuracy", (margin > 0).sum(), len(margin))
            meter.add("margin", margin.sum(), len(margin))
            meter.add("min_reward", scores.min(), 1)
            meter.add("mean_reward", scores.mean(), 1)
            meter.add("max_reward", scores.max(), 1)
            if meter is self._eval_meter:
                _add_calibration(meter, margin)
        return losses

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Sum up the calibration of the bins."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics, error = output.metrics, 0.0
        for low in _BINS:
            expected = metrics.pop(f"{metric_key_prefix}__expected/{low}", None)
            share = metrics.pop(f"{metric_key_prefix}__share/{low}", 0.0)
            if expected is not None:
                error += share * abs(metrics[f"{metric_key_prefix}_calibration/{low}"] - expected)
        metrics[f"{metric_key_prefix}_calibration_error"] = error
        return output

    def scores(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Scores ``(s,)`` of the batch's answers."""
        return scores_of(model, batch_hidden(model, inputs)[inputs["ends"]])


def _add_calibration(meter: Meter, margin: Tensor) -> None:
    probability = torch.sigmoid(margin.abs())
    right = (margin > 0).float()
    for low, high in zip(_BINS, (*_BINS[1:], 1.01), strict=True):
        inside = (probability >= low) & (probability < high)
        meter.add(f"calibration/{low}", (right * inside).sum(), inside.sum())
        meter.add(f"_expected/{low}", (probability * inside).sum(), inside.sum())
        meter.add(f"_share/{low}", inside.sum(), len(margin))
