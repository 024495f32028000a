"""Supervised fine-tuning: learn the answers, token by token.

The loss of a step is the sum of the negative log likelihoods of its target tokens divided by their number, over all
micro-batches and processes, so that it does not depend on how a batch is cut up. Targets are the answers and their EOS.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from fastpeft.data import (
    IGNORE_INDEX,
    PackedDataset,
    SFTCollator,
    SFTDataset,
    build_sft_dataset,
)
from fastpeft.errors import UserError
from fastpeft.models import has_fused_loss, report
from fastpeft.trainers.base import BaseTrainer
from fastpeft.trainers.checks import check_packing
from fastpeft.trainers.config import BaseConfig
from fastpeft.trainers.losses import token_nll
from fastpeft.trainers.utilisation import Utilisation, causal_pairs

_SHORTEST = 8  # tokens; a row has at least a prompt, an answer and EOS

_NOT_THE_MODELS = ("labels", "loss_positions", "num_tokens")  # what a batch has beside a model's arguments

Source = str | Path | Iterable[Mapping[str, Any]] | Dataset[Any]


@dataclass
class SFTConfig(BaseConfig):
    """Options of `SFTTrainer`: those of `BaseConfig`, and how rows become tokens.

    Args:
        max_length: tokens a row may have, an adapter's virtual tokens included; longer rows lose prompt, never answer.
        on_bad_row: ``"error"`` to list a file's bad rows and stop, ``"skip"`` to leave them out.
        pad_to_multiple_of: batches are padded to a multiple of this many tokens.
        packing: put several training rows into one sequence of up to ``max_length`` tokens, where they do not see each
            other (`fastpeft.data.packing`); ``per_device_train_batch_size`` then counts sequences.
    Raises:
        UserError: a value out of range.
    """

    max_length: int = field(default=1024, metadata={"help": "tokens a row may have"})
    on_bad_row: str = field(default="error", metadata={"help": "'error' or 'skip'"})
    pad_to_multiple_of: int = field(default=8, metadata={"help": "pad batches to a multiple of this"})
    packing: bool = field(default=False, metadata={"help": "put several rows into one sequence"})

    def __post_init__(self) -> None:
        if self.max_length < _SHORTEST:
            raise UserError(f"SFTConfig: max_length is {self.max_length}; it must be {_SHORTEST} tokens or more")
        if self.on_bad_row not in ("error", "skip"):
            raise UserError(f"SFTConfig: on_bad_row is {self.on_bad_row!r}; it must be 'error' or 'skip'")
        super().__post_init__()


class SFTTrainer(BaseTrainer):
    """Fine-tune a causal language model on prompts and answers.

    Args:
        model: a transformers model (all its trainable parameters are trained), or one with adapters from
            `fastpeft.get_peft_model`.
        args: options; ``SFTConfig()`` if None.
        train_dataset: a JSON Lines file, rows in memory, an `SFTDataset`, or any data set of
            ``{"input_ids", "labels"}`` items.
        eval_dataset: the same, for the evaluation loss.
        processing_class: the tokenizer.
        data_collator: takes the place of `SFTCollator`.
        callbacks: further transformers callbacks.
        optimizers: an optimizer and a scheduler to use in place of those that ``args`` describe.
    Raises:
        UserError: data, tokenizer or model cannot be used; the message says what to do.
    """

    args: SFTConfig

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig | None = None,
        train_dataset: Source | None = None,
        eval_dataset: Source | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self._virtual_tokens = getattr(model, "num_virtual_tokens", 0)
        super().__init__(
            model,
            SFTConfig() if args is None else args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._base = base
        if self.args.packing:
            with self.compute_loss_context_manager():
                check_packing(model, type(self).__name__)
        self._selects_logits = "logits_to_keep" in inspect.signature(base.forward).parameters

    # Data.

    def prepare_dataset(self, source: Source | None, argument: str) -> Dataset[Any] | None:
        """Tokenise what is not tokenised yet; the report on it is printed once."""
        if source is None:
            return None
        if isinstance(source, Dataset):
            _check_tokenised(source, argument)
            return self._packed(source, argument)
        if not isinstance(source, (str, Path, Iterable)) or isinstance(source, (Mapping, bytes)):
            raise UserError(
                f"SFTTrainer: {argument} is a {type(source).__name__}; give the path of a JSONL file, a list of rows, "
                "or an SFTDataset"
            )
        room = self.args.max_length - self._virtual_tokens
        if room < _SHORTEST:
            raise UserError(
                f"SFTTrainer: the adapter's {self._virtual_tokens} virtual tokens leave {room} of max_length "
                f"{self.args.max_length} for the text; it needs {_SHORTEST} or more, raise max_length"
            )
        dataset = build_sft_dataset(
            source,  # type: ignore[arg-type]
            self._tokenizer(),
            max_length=room,
            on_bad_row=self.args.on_bad_row,  # type: ignore[arg-type]
            name=None if isinstance(source, (str, Path)) else argument,
        )
        if self.args.progress and self.args.process_index == 0:
            print(dataset.report.summary(), flush=True)
        return self._packed(dataset, argument)

    def _packed(self, dataset: Dataset[Any], argument: str) -> Dataset[Any]:
        """The training data in sequences of several rows, if the options say so; evaluation goes row by row."""
        if not self.args.packing or argument != "train_dataset" or isinstance(dataset, PackedDataset):
            return dataset
        rows: Any = dataset
        if not hasattr(rows, "__len__"):
            raise UserError("SFTTrainer: packing needs to know all rows, and train_dataset has no length; leave it out")
        lengths = rows.lengths if hasattr(rows, "lengths") else [len(row["input_ids"]) for row in rows]
        packed = PackedDataset(rows, lengths, self.args.max_length)
        if self.args.progress and self.args.process_index == 0:
            print(packed.summary(), flush=True)
        return packed

    def default_collator(self) -> SFTCollator:
        """Pad with the padding token, or with EOS: padding is masked, so any token would do."""
        tokenizer = self._tokenizer()
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if pad_token_id is None:
            raise UserError("SFTTrainer: the tokenizer has neither a padding nor an EOS token; set tokenizer.pad_token")
        return SFTCollator(pad_token_id, self.args.pad_to_multiple_of)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.processing_class is None:
            raise UserError("SFTTrainer: the tokenizer is missing; give it as processing_class=")
        return self.processing_class

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """Fetch the micro-batches of one step and count their targets, over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        for rows, tokens in (batch["input_ids"].shape for batch in batches):
            if self.largest_batch is None or rows * tokens > math.prod(self.largest_batch):
                self.largest_batch = rows, tokens
        targets = [batch["labels"][:, 1:].ne(IGNORE_INDEX).sum() for batch in batches]
        count: Tensor = torch.stack(targets).sum().to(device)
        return batches, self._sum_over_processes(count)

    # Loss.

    def create_utilisation(self) -> Utilisation | None:
        """What the metric ``mfu`` is reckoned by; None where the model or the GPU is not known."""
        device = self.args.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        return Utilisation.of(self.model, name, self.accelerator.num_processes)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Give the loss of a micro-batch as its share in the loss of the step.

        Args:
            model: the model, as wrapped for training.
            inputs: ``input_ids``, ``labels`` and ``attention_mask``, or for packed rows ``position_ids``, ``(b, t)``;
                ``loss_positions`` ``(p,)``, where given, are the positions whose next token is a target in some row.
            return_outputs: give the model's outputs too.
            num_items_in_batch: targets of the whole step; those of this micro-batch if None.
        """
        nll, targets, correct, outputs = self._forward(model, inputs)
        if correct is not None:
            self.meter.add("mean_token_accuracy", correct, targets)
        counted = inputs["num_tokens"] if "num_tokens" in inputs else inputs["attention_mask"]
        self.meter.add("tokens", counted.sum())
        if self._utilisation is not None:
            self.meter.add("targets", targets)
            self.meter.add("pairs", causal_pairs(inputs))
        # DDP averages gradients over the processes, and the loss is a sum over them.
        scale = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = nll * scale / (targets if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        """Run the model, its output layer only where a target follows, and sum the loss: `token_nll`, and outputs.

        An accelerated model gives the loss without logits while it trains; how many targets were met is then counted
        in the steps that are logged, as it costs a further product over the vocabulary.
        """
        labels = inputs["labels"]
        positions = inputs.get("loss_positions")
        arguments: dict[str, Any] = {k: v for k, v in inputs.items() if k not in _NOT_THE_MODELS}
        if positions is None:
            positions = torch.arange(labels.shape[1] - 1, device=labels.device)
        elif self._selects_logits:
            arguments["logits_to_keep"] = positions
        if self._base.training and self._selects_logits and has_fused_loss(self._base):
            targets = labels[:, positions + 1]
            arguments.update(labels=labels, shift_labels=targets, logits_to_keep=positions, num_items_in_batch=1)
            found = report(self._base)
            if isinstance(self.data_collator, SFTCollator) and found is not None and "attention" in found.replaced:
                arguments.pop("attention_mask", None)  # it pads on the right, where no causal attention looks
            count = (targets != IGNORE_INDEX).sum()
            outputs = model(**arguments, use_cache=False, skip_logits=True, count_correct=self._is_logged())
            return outputs.loss, count, outputs.correct, outputs
        outputs = model(**arguments, use_cache=False)
        logits = outputs.logits
        if "logits_to_keep" not in arguments:
            logits = logits[:, positions]
        return (*token_nll(logits, labels[:, positions + 1]), outputs)

    def _is_logged(self) -> bool:
        """Whether the step that is running ends with a log line."""
        step, args = self.state.global_step + 1, self.args
        if args.logging_strategy != IntervalStrategy.STEPS or step >= self.state.max_steps:
            return True
        return bool(step % max(1, self.state.logging_steps) == 0 or (step == 1 and args.logging_first_step))

    # Evaluation.

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Add one batch to the evaluation."""
        with torch.no_grad():
            nll, targets, correct, _ = self._forward(model, self._prepare_inputs(inputs))
        self._eval_meter.add("loss", nll, targets)
        if correct is not None:
            self._eval_meter.add("mean_token_accuracy", correct, targets)
        return nll / targets, None, None


def _check_tokenised(dataset: Dataset[Any], argument: str) -> None:
    if isinstance(dataset, SFTDataset) or hasattr(dataset, "__len__"):
        if not len(dataset):  # type: ignore[arg-type]
            raise UserError(f"SFTTrainer: {argument} is empty; there is nothing to learn from")
        keys = dataset[0].keys()
        if not {"input_ids", "labels"} <= set(keys):
            raise UserError(
                f"SFTTrainer: items of {argument} have the keys {', '.join(map(str, keys))}; they must have input_ids "
                "and labels. Give rows as a list or a JSONL file to have them tokenised"
            )
