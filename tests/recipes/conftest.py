"""A model folder small enough for tests (two layers, 64 wide, random weights) and rows to train it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROWS = [{"input": f"Add {n} and {n + 1}.", "output": f"The sum is {2 * n + 1}."} for n in range(8)]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(row.values()) for row in ROWS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder in bfloat16; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(name="write_rows")
def write_rows_fixture() -> Callable[[Path, list[Any]], None]:
    return write_rows


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """The eight rows of ``train.jsonl``."""
    return [dict(row) for row in ROWS]


@pytest.fixture
def job(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the current one, with ``job.yaml`` and ``train.jsonl`` of a run of three steps into ``out``."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "job.yaml").write_text(
        f"""\
model:
  path: {model_folder}
  dtype: float32
peft:
  method: lora
  r: 4
  lora_alpha: 8
  target_modules: all-linear
data:
  train: train.jsonl
  max_length: 64
train:
  output_dir: out
  max_steps: 3
  learning_rate: 2e-3
  per_device_train_batch_size: 4
  logging_steps: 1
  save_strategy: no
  report_to: none
  use_cpu: true
  seed: 7
""",
        encoding="utf-8",
    )
    return tmp_path
