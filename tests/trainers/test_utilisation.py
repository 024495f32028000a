"""Model FLOPs utilisation: operations counted by hand, GPUs by name, and the metric of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.tiny import tiny_llama, tiny_lora
from transformers import MixtralConfig, MixtralForCausalLM

from fastpeft.methods import PromptTuningConfig, get_peft_model
from fastpeft.trainers import SFTTrainer
from fastpeft.trainers.utilisation import StepFlops, Utilisation, causal_pairs, peak_flops, step_flops

# Two layers of the tiny Llama: q and o 64 x 64, k and v 32 x 64, gate, up and down 128 x 64; its head is 200 x 64.
BODY = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
HEAD = 200 * 64
PAIR = 12 * 2 * 64


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_adapters_on_a_frozen_base(quantized: bool) -> None:
    inputs_and_outputs = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    expected = StepFlops(4 * BODY + 6 * 4 * inputs_and_outputs, 4 * HEAD, PAIR)
    assert step_flops(tiny_lora(quantized)) == expected


def test_all_weights_trained_with_a_tied_head() -> None:
    assert step_flops(tiny_llama()) == StepFlops(6 * BODY, 6 * HEAD, PAIR)


def test_virtual_tokens_are_no_product() -> None:
    model = get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=5))
    assert step_flops(model) == StepFlops(4 * BODY, 4 * HEAD, PAIR)


def test_models_that_have_no_count() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    assert step_flops(MixtralForCausalLM(MixtralConfig(**sizes, **heads))) is None
    assert step_flops(torch.nn.Linear(4, 4)) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_share_of_two_gpus() -> None:
    use = Utilisation.of(tiny_llama(), "NVIDIA H100 80GB HBM3", devices=2)
    assert use is not None
    flops = 6 * BODY * 1000 + 6 * HEAD * 300 + PAIR * 5000
    assert use.share(tokens=1000, targets=300, pairs=5000, seconds=0.5) == pytest.approx(flops / (0.5 * 2 * 989e12))
    assert Utilisation.of(tiny_llama(), "Tesla T4") is None
    assert Utilisation.of(tiny_llama(), None) is None


def test_pairs_of_padded_and_of_packed_rows_are_equal() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert causal_pairs({"attention_mask": mask}) == 6 + 3
    assert causal_pairs({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}) == 6 + 3


def test_a_run_logs_what_its_tokens_needed(
    make_trainer: Callable[..., SFTTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[float, ...]] = []

    def create(trainer: SFTTrainer) -> Utilisation | None:
        return Utilisation.of(trainer.model, "NVIDIA H100 80GB HBM3")

    share = Utilisation.share

    def noted(self: Utilisation, tokens: float, targets: float, pairs: float, seconds: float) -> float:
        given.append((tokens, targets, pairs))
        return share(self, tokens, targets, pairs, seconds)

    monkeypatch.setattr(SFTTrainer, "create_utilisation", create)
    monkeypatch.setattr(Utilisation, "share", noted)
    trainer = make_trainer("lora", max_steps=6, logging_steps=6)  # 22 rows: an epoch, which is all rows once
    trainer.train()
    items: list[Any] = list(trainer.train_dataset)
    lengths = [len(item["input_ids"]) for item in items]
    targets = sum(label != -100 for item in items for label in item["labels"])
    assert given == [(sum(lengths), targets, sum(n * (n + 1) // 2 for n in lengths))]
    (line, *_) = [json.loads(row) for row in (Path(trainer.args.output_dir) / "metrics.jsonl").open()]
    assert 0 < line["mfu"] < 1 and "pairs" not in line and "targets" not in line
    longest = -(-max(lengths) // 8) * 8
    assert trainer.largest_batch is not None and trainer.largest_batch[1] == longest


def test_no_metric_on_a_cpu(make_trainer: Callable[..., SFTTrainer]) -> None:
    trainer = make_trainer("lora", max_steps=1)
    trainer.train()
    assert "mfu" not in trainer.state.log_history[0] and trainer.peak_memory() is None
