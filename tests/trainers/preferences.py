"""Rows for the trainers on preferences, their options in tests, and a tiny model that adapters can move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trainers.tiny import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from fastpeft.methods import LoraConfig

PAIRS = [
    {"prompt": f"what is {i} + {i} =", "chosen": f"answer {2 * i}", "rejected": f"{2 * i + 1} and {i}"}
    for i in range(12)
]
RANKINGS = [
    {"prompt": row["prompt"], "responses": [row["rejected"], row["chosen"], "="], "ranking": [2, 1, 3]} for row in PAIRS
]
PROMPTS = [{"prompt": row["prompt"], "answer": 2 * i} for i, row in enumerate(PAIRS)]


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")


def loud_llama() -> LlamaForCausalLM:
    """The tiny model with the tokenizer's vocabulary, and an output layer of the size that trained ones have.

    With that of `tiny_llama` every logit is about 0, and an adapter on a frozen base cannot change that.
    """
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "vocab_size": 25, "tie_word_embeddings": False})
    torch.manual_seed(7)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "progress": False,
        "use_cpu": True,
    }
    return {**given, **changes}
