"""Direct preference optimisation: a policy learns from pairs of answers, held to a reference.

The reference is the same model without its adapter, or with another of its adapters, or a second model; its
log-probabilities can be computed once and kept on disk (`reference_cache`). Log-probabilities come from
`fastpeft.ops.linear_logprobs`, so the logits of a batch never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastpeft.data import MixedDataset, PreferenceDataset
from fastpeft.errors import UserError, did_you_mean
from fastpeft.methods import LoraConfig, PeftModel, get_peft_model
from fastpeft.trainers.forward import batch_hidden, role
from fastpeft.trainers.heads import LogprobHead
from fastpeft.trainers.losses import DPO_LOSSES, LENGTH_NORMALISED, dpo_loss
from fastpeft.trainers.metrics import Meter
from fastpeft.trainers.preference import PreferenceConfig, PreferenceTrainer, Source
from fastpeft.trainers.reference_cache import fingerprint, read_logps, write_logps

_SFT = "sft"  # beside DPO_LOSSES: the negative log-likelihood of the chosen answers


@dataclass
class DPOConfig(PreferenceConfig):
    """Options of `DPOTrainer`: those of `PreferenceConfig`, and the loss.

    Args:
        beta: how strongly the policy is held to the reference.
        loss_type: one of `fastpeft.trainers.losses.DPO_LOSSES` or ``"sft"``, or several, which are summed.
        loss_weights: a weight for each of several losses; None for 1.
        label_smoothing: share of pairs taken to be labelled the wrong way round.
        ref_adapter_name: an adapter of the model that is the reference; None for the model without adapters.
        precompute_ref_log_probs: compute the reference's log-probabilities before training and keep them on disk.
        reference_cache: folder for them; None for ``output_dir/reference``.
    Raises:
        UserError: a value out of range.
    """

    learning_rate: float = 5e-6
    beta: float = field(default=0.1, metadata={"help": "how strongly the policy is held to the reference"})
    loss_type: str | list[str] = field(default="sigmoid", metadata={"help": "which loss, or several"})
    loss_weights: list[float] | None = field(default=None, metadata={"help": "a weight for each of several losses"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of pairs taken to be labelled wrongly"})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "the adapter that is the reference"})
    precompute_ref_log_probs: bool = field(default=False, metadata={"help": "compute the reference once"})
    reference_cache: str | None = field(default=None, metadata={"help": "folder for the reference's numbers"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            self._refuse("beta", "it must be above 0")
        known = (*DPO_LOSSES, _SFT)
        for name in self.loss_types:
            if name not in known:
                self._refuse("loss_type", f"it must be one of {', '.join(known)}{did_you_mean(name, known)}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_types):
            self._refuse("loss_weights", f"it must have a weight for each of {', '.join(self.loss_types)}")
        low = "above 0" if "exo_pair" in self.loss_types else "0 or more"
        if not (0 <= self.label_smoothing < 0.5 and (self.label_smoothing or low != "above 0")):
            self._refuse("label_smoothing", f"it must be {low} and below 0.5")
        super().__post_init__()

    @property
    def loss_types(self) -> list[str]:
        """The losses, as a list."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)


class DPOTrainer(PreferenceTrainer):
    """Train a policy on pairs of answers, or on all pairs of rankings.

    Metrics: ``rewards/chosen``, ``rewards/rejected``, ``rewards/accuracies``, ``rewards/margins``, ``logps/chosen``,
    ``logps/rejected``, ``entropy``.

    Args:
        model: a causal language model, with an adapter or without.
        ref_model: a second model as the reference. None takes the model itself without its adapter, or with
            ``args.ref_adapter_name``.
        args: options; ``DPOConfig()`` if None.
        train_dataset: a JSON Lines file, rows in memory, or a `PreferenceDataset`.
        eval_dataset: the same.
        processing_class: the tokenizer.
        data_collator: takes the place of `PreferenceCollator`.
        callbacks: further transformers callbacks.
        optimizers: an optimizer and a scheduler to use in place of those that ``args`` describe.
        peft_config: an adapter to make.
    Raises:
        UserError: data, tokenizer or model cannot be used, or there is nothing that could be the reference.
    """

    args: DPOConfig
    _chosen_tokens: Tensor | None = None  # a pair, in the step that is running

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        args: DPOConfig | None = None,
        train_dataset: Source | None = None,
        eval_dataset: Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: LoraConfig | None = None,
    ) -> None:
        args = DPOConfig() if args is None else args
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise UserError(
                    "DPOTrainer: the model has an adapter and peft_config asks for another; give one of them"
                )
            model = get_peft_model(model, peft_config)
        _check_reference(model, ref_model, args)
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
        self._head = LogprobHead(model, "DPOTrainer")
        self.ref_model = None if ref_model is None else ref_model.to(args.device).eval().requires_grad_(False)  # type: ignore[arg-type]
        self._ref_head = None if ref_model is None else LogprobHead(ref_model, "DPOTrainer")

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """Fetch the micro-batches of one step; count their pairs and the tokens of their chosen answers."""
        batches, pairs = super().get_batch_samples(epoch_iterator, num_batches, device)
        if pairs is None:
            return batches, None
        tokens = torch.stack([_lengths(batch)[batch["pairs"][:, 0]].sum() for batch in batches]).sum().to(device)
        return batches, torch.stack([pairs, self._sum_over_processes(tokens)])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Give the loss of a micro-batch as its share in the loss of the step."""
        self._chosen_tokens = None if num_items_in_batch is None else num_items_in_batch[1] / num_items_in_batch[0]  # type: ignore[index]
        pairs = None if num_items_in_batch is None else num_items_in_batch[0]  # type: ignore[index]
        return super().compute_loss(model, inputs, return_outputs, pairs)

    def pair_losses(self, model: nn.Module, inputs: dict[str, Tensor], meter: Meter) -> Tensor:
        """Losses of the batch's pairs, by the types and weights of the options."""
        reference = inputs["ref_logps"] if "ref_logps" in inputs else self.reference_logps(model, inputs)
        logps, entropy = self._logps(model, inputs, self._head)
        lengths = _lengths(inputs)
        better, worse = inputs["pairs"].unbind(1)
        args = self.args
        weights = args.loss_weights or [1.0] * len(args.loss_types)
        total = logps.new_zeros(len(better))
        step_tokens = self._chosen_tokens if meter is self.meter else None
        for name, weight in zip(args.loss_types, weights, strict=True):
            if name == _SFT:
                # A mean over tokens, not pairs: the mean over pairs of this has to be it.
                tokens = lengths[better].float().mean() if step_tokens is None else step_tokens
                total = total - weight * logps[better] / tokens
                continue
            by = lengths if name in LENGTH_NORMALISED else torch.ones_like(lengths)
            policy, ref = logps / by, reference / by
            numbers = (policy[better], policy[worse], ref[better], ref[worse])
            total = total + weight * dpo_loss(*numbers, args.beta, name, args.label_smoothing)[0]
        with torch.no_grad():
            rewards = args.beta * (logps - reference)
            chosen, rejected = rewards[better], rewards[worse]
            count = len(better)
            meter.add("rewards/chosen", chosen.sum(), count)
            meter.add("rewards/rejected", rejected.sum(), count)
            meter.add("rewards/accuracies", (chosen > rejected).sum(), count)
            meter.add("rewards/margins", (chosen - rejected).sum(), count)
            meter.add("logps/chosen", logps[better].sum(), count)
            meter.add("logps/rejected", logps[worse].sum(), count)
            meter.add("entropy", entropy.sum(), len(entropy))
        return total

    def _logps(self, model: nn.Module, inputs: dict[str, Tensor], head: LogprobHead) -> tuple[Tensor, Tensor]:
        """Log-probability of each answer, and the entropy at each of their tokens."""
        hidden = batch_hidden(model, inputs)[inputs["sources"]]
        logprobs, entropy = head(hidden, inputs["targets"], entropy=True)
        sums = logprobs.new_zeros(len(inputs["ends"])).index_add(0, inputs["owners"], logprobs)
        return sums, entropy

    @torch.no_grad()
    def reference_logps(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probability of each answer under the reference."""
        if self.ref_model is not None:
            assert self._ref_head is not None
            return self._logps(self.ref_model, inputs, self._ref_head)[0]
        with role(model, self.args.ref_adapter_name):
            return self._logps(model, inputs, self._head)[0]

    # The reference's numbers, once for all.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; where the options say so, after computing or reading the reference's log-probabilities."""
        if self.args.precompute_ref_log_probs:
            self.precompute_reference(self.train_dataset)
        return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, as `PreferenceTrainer` does."""
        dataset = self.prepare_dataset(self.eval_dataset if eval_dataset is None else eval_dataset, "eval_dataset")
        if self.args.precompute_ref_log_probs and self._can_forget_reference:
            self.precompute_reference(dataset)
        return super().evaluate(dataset, *args, **kwargs)

    @property
    def _can_forget_reference(self) -> bool:
        """Whether the reference can still be computed: the model's own start is gone once it trains whole."""
        return self.ref_model is not None or isinstance(self.model, PeftModel) or self.state.global_step == 0

    @torch.no_grad()
    def precompute_reference(self, dataset: Dataset[Any] | None) -> None:
        """Give a data set the reference's log-probabilities, from disk where they were computed before.

        Args:
            dataset: a `PreferenceDataset`, or a mixture of them; None and one that has them already are passed over.
        Raises:
            UserError: the data set is of another kind.
        """
        if dataset is None or (isinstance(dataset, PreferenceDataset) and dataset.has_reference):
            return
        if isinstance(dataset, MixedDataset):
            for part in dataset.parts:
                self.precompute_reference(part)
            return
        if not isinstance(dataset, PreferenceDataset):
            raise UserError(
                "DPOTrainer: precompute_ref_log_probs needs rows or a PreferenceDataset, not another data set"
            )
        model = self.model if self.ref_model is None else self.ref_model
        adapter = self.args.ref_adapter_name if self.ref_model is None else None
        key = fingerprint(dataset, model, adapter)
        path = Path(self.args.reference_cache or Path(str(self.args.output_dir)) / "reference") / f"{key}.safetensors"
        logps = read_logps(path, dataset)
        if logps is None:
            was_training = model.training
            model.eval()
            logps = []
            collate = self.data_collator
            for batch in DataLoader(dataset, self.args.per_device_eval_batch_size, collate_fn=collate):  # type: ignore[arg-type]
                batch = self._prepare_inputs(batch)
                logps += self.reference_logps(model, batch).tolist()
            model.train(was_training)
            if self.args.should_save:
                write_logps(path, logps)
        dataset.attach_reference(_by_row(logps, dataset))


def _by_row(logps: Sequence[float], dataset: PreferenceDataset) -> list[list[float]]:
    rows, begin = [], 0
    for count in dataset.completion_counts:
        rows.append(list(logps[begin : begin + count]))
        begin += count
    return rows


def _lengths(inputs: dict[str, Tensor]) -> Tensor:
    """Tokens of each answer."""
    return torch.bincount(inputs["owners"], minlength=len(inputs["ends"]))


def _check_reference(model: nn.Module, ref_model: nn.Module | None, args: DPOConfig) -> None:
    if ref_model is model:
        raise UserError("DPOTrainer: ref_model is the model itself, which changes; leave it out, or load it twice")
    adapted = isinstance(model, PeftModel)
    name = args.ref_adapter_name
    if name is not None:
        if ref_model is not None:
            raise UserError("DPOTrainer: both ref_model and ref_adapter_name are given; give one of them")
        if not isinstance(model, PeftModel) or name not in model.peft_config:
            there = ", ".join(model.peft_config) if isinstance(model, PeftModel) else "no adapter"
            raise UserError(f"DPOTrainer: ref_adapter_name is {name!r}; the model has {there}")
        if name in model.active_adapters:
            raise UserError(
                f"DPOTrainer: ref_adapter_name is {name!r}, which is what is trained; load the adapter a second time "
                "under another name as the reference"
            )
    if not adapted and ref_model is None and not args.precompute_ref_log_probs:
        raise UserError(
            "DPOTrainer: the model has no adapter to leave out, so it cannot be its own reference; give ref_model=, or "
            "peft_config=, or set precompute_ref_log_probs: true"
        )
