"""Fifty steps of QLoRA beside transformers + PEFT on the same weights: the losses must tell the same story."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastpeft
from fastpeft.data import SFTCollator
from fastpeft.nn import NF4Linear

STEPS = 50
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "remove_unused_columns": False,
    "use_cpu": True,
    "seed": 7,
}


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Counting sequences after a masked prompt: something to learn within fifty steps."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start, length = index % 8, 6 + index % 9
        prompt = [100 + index % 20] * (3 + index % 5)
        answer = [(start + i) % 8 for i in range(length)] + [127]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def dequantized(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with dense layers that hold the decoded NF4 weights."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, NF4Linear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = torch.nn.Parameter(module.dequantize())
            parent, _, child = name.rpartition(".")
            setattr(dense.get_submodule(parent), child, linear)
    return dense


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("accelerated", [False, True], ids=["", "accelerated"])
def test_fifty_steps_follow_transformers_and_peft(tmp_path: Path, accelerated: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    base = fastpeft.quantize(LlamaForCausalLM(config))
    theirs = peft.get_peft_model(dequantized(base), peft.LoraConfig(**LORA))
    if accelerated:
        fastpeft.accelerate(base, checkpointing="full")
    ours = fastpeft.get_peft_model(base, fastpeft.LoraConfig(**LORA))
    start = {name: value for name, value in theirs.state_dict().items() if "lora_" in name}
    unknown = ours.load_state_dict(start, strict=False).unexpected_keys
    assert not unknown, f"parameter names differ from PEFT's: {unknown}"

    class PlainCollator(SFTCollator):
        def __call__(self, items: Any) -> dict[str, torch.Tensor]:
            batch = super().__call__(items)
            del batch["loss_positions"]
            return batch

    reference = Trainer(
        theirs,
        TrainingArguments(str(tmp_path / "theirs"), disable_tqdm=True, **OPTIONS),
        data_collator=PlainCollator(0),
        train_dataset=Rows(),
    )
    arguments = fastpeft.SFTConfig(str(tmp_path / "ours"), progress=False, **OPTIONS)
    trainer = fastpeft.SFTTrainer(ours, arguments, Rows(), data_collator=SFTCollator(0), processing_class=Tokenless())
    reference.train()
    trainer.train()

    expected, observed = losses(reference), losses(trainer)
    assert len(expected) == len(observed) == STEPS
    assert expected[-1] < 0.85 * expected[0], "nothing was learned, so nothing was compared"
    residual = (observed - expected) / expected
    assert residual.abs().max() < 0.01, f"largest deviation {residual.abs().max():.4f}"
    # A dropped factor drifts to one side; rounding does not.
    assert residual.mean().abs() < 0.001, f"mean deviation {residual.mean():.5f}"


class Tokenless:
    """Stands in for a tokenizer where rows are tokenised already."""

    pad_token_id = 0
    eos_token_id = 127
    padding_side = "right"
    model_input_names = ("input_ids",)

    def save_pretrained(self, folder: str) -> None:
        """Nothing to save."""
