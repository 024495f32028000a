"""The same DPO by TRL and PEFT, for preference_acceptance.py: same weights, adapter, token rows, batches and options.

Rows reach TRL as fastpeft's token ids, in the batches in which fastpeft trained on them. So the two differ in their
arithmetic alone. Whether TRL would have made the same ids of the text is checked on a few rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import correlation
from typing import Any

import datasets
import trl
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging as transformers_logging

from fastpeft import DPOConfig
from fastpeft.data import PreferenceDataset, build_preference_dataset, parse_comparison

# What both configs have by the same name.
_SHARED = (
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "beta",
    "label_smoothing",
    "seed",
)
_CURVES = ("loss", "grad_norm", "logps/chosen", "rewards/margins")
VERSIONS = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "peft", "transformers", "torch"))


class _InOrder(trl.DPOTrainer):
    """TRL's trainer on rows that are token ids already, in the batches it is told."""

    batches: Sequence[Sequence[int]] = ()

    def _prepare_dataset(self, dataset: Any, *given: Any) -> Any:
        return dataset

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches, without a shuffle."""
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)

    def own_rows(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The token ids that TRL makes of messages."""
        return super()._prepare_dataset(datasets.Dataset.from_list(rows), self.processing_class, self.args, "check")


def train_with_trl(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path,
    rows: PreferenceDataset,
    batches: Sequence[Sequence[int]],
    probe: Sequence[str],
    options: DPOConfig,
    autocast: bool,
) -> tuple[list[dict[str, float]], float]:
    """Train an adapter of PEFT's with TRL, in place of the file it came from.

    Args:
        base: the model without an adapter.
        tokenizer: its tokenizer.
        adapter: folder of the adapter to begin with; the trained one is saved here too.
        rows: fastpeft's token rows.
        batches: which of them each step takes.
        probe: lines of the file, of which TRL's own token ids are compared with fastpeft's.
        options: fastpeft's, of the run to be repeated.
        autocast: compute in bfloat16 over float32 adapters, as fastpeft does over a bfloat16 model.
    Returns:
        TRL's log line of each step, and the seconds of the training.
    Raises:
        SystemExit: the token ids differ.

    TRL from 1.15 on computes log-probabilities in Triton, so it needs a GPU.
    """
    args = trl.DPOConfig(
        output_dir=str(adapter),
        max_length=None,  # rows are cut already
        bf16=autocast,
        use_cpu=options.device.type == "cpu",
        optim="adamw_torch",
        gradient_checkpointing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{name: getattr(options, name) for name in _SHARED},
    )
    policy = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trainer = _InOrder(policy, args=args, train_dataset=_as_pairs(rows), processing_class=tokenizer)
    trainer.batches = batches
    trainer.remove_callback(PrinterCallback)
    _check_tokens(trainer, tokenizer, probe)
    begin = time.perf_counter()
    transformers_logging.set_verbosity_error()
    trainer.train()
    seconds = time.perf_counter() - begin
    policy.save_pretrained(adapter, selected_adapters=["default"])
    return [line for line in trainer.state.log_history if "grad_norm" in line], seconds


def _as_pairs(rows: PreferenceDataset) -> datasets.Dataset:
    def pair(item: Mapping[str, Any]) -> dict[str, list[int]]:
        ((better, worse),), completions = item["pairs"], item["completions"]
        return {
            "prompt_ids": item["prompt_ids"],
            "chosen_ids": completions[better],
            "rejected_ids": completions[worse],
        }

    return datasets.Dataset.from_list(list(map(pair, rows)))


def _check_tokens(trainer: _InOrder, tokenizer: PreTrainedTokenizerBase, lines: Sequence[str]) -> None:
    """TRL's token ids of whole rows have to be ours, up to the white space that a template puts after the end token."""
    rows = [json.loads(line) for line in lines]
    ours = build_preference_dataset(rows, tokenizer, max_length=1 << 20)
    messages = []
    for row in rows:
        comparison = parse_comparison(row, "check")
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in comparison.responses)
        prompt = [turn.as_dict() for turn in comparison.prompt]
        messages.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    surplus = set()
    for number, (own, theirs) in enumerate(zip(_as_pairs(ours), trainer.own_rows(messages), strict=True)):
        for key, ids in own.items():
            found = theirs[key]
            rest = tokenizer.decode(found[len(ids) :])
            if found[: len(ids)] != ids or rest.strip():
                raise SystemExit(
                    f"row {number}, {key}: TRL has {len(found)} token ids and fastpeft {len(ids)}, and they differ:\n"
                    f"TRL:      {tokenizer.decode(found)!r}\nfastpeft: {tokenizer.decode(ids)!r}"
                )
            surplus.add(rest)
    told = ", ".join(map(repr, sorted(surplus - {""})))
    print(
        f"token ids of {len(rows)} rows: TRL's are fastpeft's"
        + (f", but for {told} that the template has after the end token; neither run trains on it" if told else "")
    )


def curves_table(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], first: int = 20) -> str:
    """How near the two runs' logs are to each other, over the first steps and over all."""
    lines = []
    for name in _CURVES:
        a, b = ([float(line[name]) for line in log] for log in (ours, theirs))
        nearby = max(abs(x - y) for x, y in zip(a[:first], b[:first], strict=True))
        alike = f"{correlation(a, b):.5f}" if len(a) > 2 and len({*a}) > 1 and len({*b}) > 1 else "-"
        lines.append(
            f"{name:16s} step 1: {a[0]:.6f} {b[0]:.6f}   steps 1-{min(first, len(a))}: largest difference {nearby:.2e}"
            f"   all {len(a)} steps: correlation {alike}"
        )
    return "\n".join(lines)
