"""What trainers on compared answers share: their data, batches that count pairs, and an evaluation weighed by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fastpeft.data import PreferenceCollator, PreferenceDataset, build_preference_dataset
from fastpeft.data.preference_batch import LAYOUTS
from fastpeft.errors import UserError, did_you_mean
from fastpeft.trainers.base import BaseTrainer
from fastpeft.trainers.config import BaseConfig
from fastpeft.trainers.forward import attention_of, disable_dropout, token_count
from fastpeft.trainers.metrics import Meter

_SHORTEST = 8

Source = str | Path | Iterable[Mapping[str, Any]] | Dataset[Any]


@dataclass
class PreferenceConfig(BaseConfig):
    """Options of trainers on compared answers: those of `BaseConfig`, and how rows become batches.

    Args:
        max_length: tokens that a prompt and an answer may have together; longer rows lose prompt, never answer.
        on_bad_row: ``"error"`` to list a file's bad rows and stop, ``"skip"`` to leave them out.
        pad_to_multiple_of: rows of a batch are padded to a multiple of this many tokens.
        layout: ``"padded"``: a row an answer; ``"shared"``: the prompt once for all its answers; ``"packed"``: one row
            without padding, worth it with a variable-length attention kernel; ``"auto"`` chooses between the first
            two, batch by batch, or takes ``"packed"`` where the model has such a kernel.
        disable_dropout: no dropout in training.
    Raises:
        UserError: a value out of range.
    """

    max_length: int = field(default=1024, metadata={"help": "tokens a prompt and an answer may have together"})
    on_bad_row: str = field(default="error", metadata={"help": "'error' or 'skip'"})
    pad_to_multiple_of: int = field(default=8, metadata={"help": "pad rows to a multiple of this"})
    layout: str = field(default="auto", metadata={"help": "auto, padded, shared or packed"})
    disable_dropout: bool = field(default=True, metadata={"help": "no dropout in training"})

    def __post_init__(self) -> None:
        if self.max_length < _SHORTEST:
            self._refuse("max_length", f"it must be {_SHORTEST} tokens or more")
        if self.on_bad_row not in ("error", "skip"):
            self._refuse("on_bad_row", "it must be 'error' or 'skip'")
        if self.layout not in LAYOUTS:
            self._refuse("layout", f"it must be one of {', '.join(LAYOUTS)}{did_you_mean(self.layout, LAYOUTS)}")
        super().__post_init__()


class PreferenceTrainer(BaseTrainer):
    """Data, batches and evaluation; a subclass says what the loss is, in `pair_losses`."""

    args: PreferenceConfig

    def __init__(self, model: nn.Module, args: PreferenceConfig, **given: Any) -> None:
        self._attention = attention_of(model) if isinstance(model, nn.Module) else "plain"
        super().__init__(model, args, **given)
        if args.disable_dropout:
            disable_dropout(model)

    def prepare_dataset(self, source: Source | None, argument: str) -> Dataset[Any] | None:
        """Tokenise what is not tokenised yet; the report on it is printed once."""
        name = type(self).__name__
        if source is None or isinstance(source, PreferenceDataset):
            return source
        if isinstance(source, Dataset):
            keys = set(source[0])
            if not {"prompt_ids", "completions", "pairs"} <= keys:
                raise UserError(
                    f"{name}: items of {argument} have the keys {', '.join(map(str, keys))}; they must be those of "
                    "fastpeft.data.PreferenceDataset. Give rows as a list or a JSONL file to have them tokenised"
                )
            return source
        if not isinstance(source, (str, Path, Iterable)) or isinstance(source, (Mapping, bytes)):
            raise UserError(
                f"{name}: {argument} is a {type(source).__name__}; give the path of a JSONL file, a list of rows, or a "
                "PreferenceDataset"
            )
        dataset = build_preference_dataset(
            source,  # type: ignore[arg-type]
            self._tokenizer(),
            max_length=self.args.max_length,
            on_bad_row=self.args.on_bad_row,  # type: ignore[arg-type]
            name=None if isinstance(source, (str, Path)) else argument,
        )
        if self.args.progress and self.args.process_index == 0:
            print(dataset.report.summary(), flush=True)
        return dataset

    def default_collator(self) -> PreferenceCollator:
        """Lay batches out as the options and the model's attention want it."""
        tokenizer = self._tokenizer()
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        layout = self.args.layout
        if layout == "auto" and self._attention != "masked":
            layout = "packed" if self._attention == "packed" else "padded"
        if layout == "shared" and self._attention != "masked":
            raise UserError(
                f"{type(self).__name__}: layout is 'shared', which needs an attention mask of its own, and this "
                "model's attention (flash, or with a sliding window) takes none; use 'auto'"
            )
        return PreferenceCollator(pad_token_id or 0, layout, self.args.pad_to_multiple_of)  # type: ignore[arg-type]

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.processing_class is None:
            raise UserError(f"{type(self).__name__}: the tokenizer is missing; give it as processing_class=")
        return self.processing_class

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """Fetch the micro-batches of one step and count their pairs, over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        count = torch.tensor(sum(len(batch["pairs"]) for batch in batches), device=device)
        return batches, self._sum_over_processes(count)

    def pair_losses(self, model: nn.Module, inputs: dict[str, Tensor], meter: Meter) -> Tensor:
        """Give the loss ``(p,)`` of each pair of a batch, and add to the metrics."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Give the loss of a micro-batch as its share in the mean over the pairs of the step."""
        losses = self.pair_losses(model, inputs, self.meter)
        self.meter.add("tokens", token_count(inputs))
        scale = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = losses.sum() * scale / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"losses": losses}) if return_outputs else loss

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
            losses = self.pair_losses(model, self._prepare_inputs(inputs), self._eval_meter)
        self._eval_meter.add("loss", losses.sum(), len(losses))
        return losses.mean(), None, None
