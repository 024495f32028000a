"""What `PPOTrainer` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastpeft.errors import did_you_mean
from fastpeft.trainers.config import BaseConfig

_FROM_0 = ("0 or more", lambda value: value >= 0)
_ABOVE_0 = ("above 0", lambda value: value > 0)
_COUNT = ("a whole number of 1 or more", lambda value: value >= 1 and value % 1 == 0)
_SHARE = ("from 0 to 1", lambda value: 0 <= value <= 1)
_RULES: dict[str, tuple[str, Any]] = {
    "response_length": _COUNT,
    "temperature": _ABOVE_0,
    "num_ppo_epochs": _COUNT,
    "num_mini_batches": _COUNT,
    "num_generations": _COUNT,
    "forward_batch_size": _COUNT,
    "kl_coef": _FROM_0,
    "target_kl": _ABOVE_0,
    "kl_horizon": _ABOVE_0,
    "cliprange": _ABOVE_0,
    "cliprange_value": _ABOVE_0,
    "vf_coef": _FROM_0,
    "gamma": _SHARE,
    "lam": _SHARE,
    "missing_eos_penalty": _FROM_0,
    "max_prompt_length": _COUNT,
    "log_completions_steps": _FROM_0,
}
_CHOICES = {
    "advantage": ("gae", "group"),
    "kl_estimator": ("k1", "k3"),
    "on_bad_row": ("error", "skip"),
    "on_bad_reward": ("raise", "skip"),
}


@dataclass
class PPOConfig(BaseConfig):
    """Options of `PPOTrainer`: those of `BaseConfig`, and TRL's names for what PPO has.

    A step is an update: ``per_device_train_batch_size`` prompts are answered, scored, and learnt from in
    ``num_ppo_epochs`` times ``num_mini_batches`` steps of the optimizer.

    Args:
        response_length: tokens a completion may have.
        temperature: of sampling, and of the log-probabilities that are learnt from.
        num_generations: completions a prompt.
        num_ppo_epochs: times an update goes over its completions.
        num_mini_batches: steps of the optimizer in each of these.
        forward_batch_size: completions that go through the model at a time; the result does not depend on it.
        advantage: ``"gae"`` with a value head, or ``"group"``, a completion against the others of its prompt (GRPO,
            which takes ``num_generations`` of 2 or more, and holds the policy by a KL term in the loss).
        scale_group: divide a group's advantages by their standard deviation.
        kl_coef: weight of the KL divergence from the reference.
        kl_estimator: ``"k1"`` or ``"k3"``, of the KL in the rewards; the term in the loss of ``"group"`` is k3.
        target_kl: nats a completion to which ``kl_coef`` is adapted; None keeps it as it is.
        kl_horizon: completions over which it adapts.
        cliprange: of the ratio of probabilities.
        cliprange_value: of the values.
        vf_coef: weight of the value loss.
        gamma: discount.
        lam: of the generalised advantage estimate.
        whiten_rewards: scale the rewards of a batch to variance 1.
        missing_eos_penalty: taken off the score of a completion that did not end by itself.
        ref_adapter_name: an adapter that is the reference; None for the model without adapters.
        reward_adapter_name: an adapter whose score layer scores completions.
        value_adapter_name: the adapter of the value head; made if there is none of this name.
        max_prompt_length: tokens a prompt may have; longer ones are dropped and counted.
        on_bad_row: ``"error"`` to list a file's bad rows and stop, ``"skip"`` to leave them out.
        on_bad_reward: a reward that is no finite number never reaches the weights. ``"raise"`` stops the run,
            ``"skip"`` leaves the sample out and counts it.
        log_completions_steps: every how many updates some completions go to ``completions.jsonl``; 0 for never.
        disable_dropout: no dropout in training.
    Raises:
        UserError: a value out of range.
    Source:
        Ziegler et al., arXiv 1909.08593, section 2.2 (adaptive KL); GRPO: DeepSeekMath, arXiv 2402.03300.
    """

    best_metric: ClassVar[str] = "eval_objective/rlhf_reward"

    learning_rate: float = 1e-5
    warmup_steps: float = 0.0
    logging_steps: float = 1
    response_length: int = field(default=53, metadata={"help": "tokens a completion may have"})
    temperature: float = field(default=0.7, metadata={"help": "of sampling"})
    num_generations: int = field(default=1, metadata={"help": "completions a prompt"})
    num_ppo_epochs: int = field(default=4, metadata={"help": "times an update goes over its completions"})
    num_mini_batches: int = field(default=1, metadata={"help": "optimizer steps in each of these"})
    forward_batch_size: int = field(default=32, metadata={"help": "completions in the model at a time"})
    advantage: str = field(default="gae", metadata={"help": "'gae' or 'group' (GRPO)"})
    scale_group: bool = field(default=True, metadata={"help": "divide a group's advantages by their deviation"})
    kl_coef: float = field(default=0.05, metadata={"help": "weight of the KL divergence"})
    kl_estimator: str = field(default="k1", metadata={"help": "'k1' or 'k3'"})
    target_kl: float | None = field(default=None, metadata={"help": "KL to which kl_coef is adapted"})
    kl_horizon: float = field(default=10000, metadata={"help": "completions over which it adapts"})
    cliprange: float = field(default=0.2, metadata={"help": "of the ratio of probabilities"})
    cliprange_value: float = field(default=0.2, metadata={"help": "of the values"})
    vf_coef: float = field(default=0.1, metadata={"help": "weight of the value loss"})
    gamma: float = field(default=1.0, metadata={"help": "discount"})
    lam: float = field(default=0.95, metadata={"help": "of the advantage estimate"})
    whiten_rewards: bool = field(default=False, metadata={"help": "scale rewards to variance 1"})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "for completions without an end"})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "the adapter that is the reference"})
    reward_adapter_name: str | None = field(default=None, metadata={"help": "the adapter that scores"})
    value_adapter_name: str = field(default="value", metadata={"help": "the adapter of the value head"})
    max_prompt_length: int = field(default=512, metadata={"help": "tokens a prompt may have"})
    on_bad_row: str = field(default="error", metadata={"help": "'error' or 'skip'"})
    on_bad_reward: str = field(default="raise", metadata={"help": "'raise' or 'skip'"})
    log_completions_steps: int = field(default=10, metadata={"help": "every how many updates samples are written"})
    disable_dropout: bool = field(default=True, metadata={"help": "no dropout in training"})

    def __post_init__(self) -> None:
        for name, (words, holds) in _RULES.items():
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, (int, float)) and abs(value) < float("inf") and holds(value)
            ):
                self._refuse(name, f"it must be {words}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                near = did_you_mean(getattr(self, name), choices)
                self._refuse(name, f"it must be one of {', '.join(choices)}{near}")
        if self.advantage == "group" and self.num_generations < 2:
            self._refuse("num_generations", "advantage 'group' compares the completions of a prompt; give 2 or more")
        if self.gradient_accumulation_steps != 1:
            self._refuse(
                "gradient_accumulation_steps",
                "an update is learnt from as a whole; set per_device_train_batch_size to its prompts, and "
                "forward_batch_size to what fits",
            )
        if self.fp16:
            self._refuse("fp16", "PPO has no loss scaling; use bf16")
        if self.per_device_train_batch_size < self.num_mini_batches:
            self._refuse("num_mini_batches", "it must be no more than per_device_train_batch_size")
        super().__post_init__()
