"""A tokenizer of digits and a few words, rows of little sums, and trainers over the tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from trainers.tiny import MODELS
from transformers import PreTrainedTokenizerFast

from fastpeft.trainers import SFTConfig, SFTTrainer

VOCABULARY = ["<unk>", "<s>", "</s>", "<pad>", *"0123456789+-= ", "what", "is", "the", "sum", "of", "and", "answer"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|."), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """22 rows of uneven length, so that batches of 4 end with a smaller one."""
    return [
        {"input": f"what is the sum of {7 * i} and {i} =" if i % 3 else f"{7 * i}+{i} =", "output": str(8 * i)}
        for i in range(22)
    ]


@pytest.fixture
def make_trainer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> Callable[..., SFTTrainer]:
    """A trainer over the tiny model; keywords that SFTTrainer does not take go to SFTConfig."""

    def make(model: nn.Module | str = "full", folder: str = "run", **options: Any) -> SFTTrainer:
        given = {
            key: options.pop(key)
            for key in ("train_dataset", "eval_dataset", "processing_class", "callbacks", "data_collator", "optimizers")
            if key in options
        }
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "progress": False,
            "max_length": 64,
            "use_cpu": True,
        }
        return SFTTrainer(
            MODELS[model]() if isinstance(model, str) else model,
            SFTConfig(**{**defaults, **options}),
            **{"train_dataset": rows, "processing_class": tokenizer, **given},
        )

    return make
