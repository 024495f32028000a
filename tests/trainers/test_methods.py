"""Every method under SFTTrainer: it learns, resumes in the middle of an epoch to the bit, and counts its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from trainers.tiny import assert_equal_weights, losses_of, tiny_llama, tiny_mixture, weights_of

import fastpeft
from fastpeft.errors import UserError
from fastpeft.methods import (
    AdapterConfig,
    BottleneckAdapterConfig,
    FullConfig,
    IA3Config,
    LoraConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    lora_plus_groups,
)
from fastpeft.models import quantize
from fastpeft.optim import AdamW
from fastpeft.trainers import SFTTrainer

MakeTrainer = Callable[..., SFTTrainer]
METHODS: dict[str, AdapterConfig] = {
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True, lora_dropout=0.1),
    "pissa": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    "shared-a": LoraConfig(r=4, target_modules="all-linear", shared_a=True),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "dora-embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "experts": LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    "ia3": IA3Config(),
    "prompt": PromptTuningConfig(num_virtual_tokens=6),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=6, encoder_hidden_size=16),
    "p-tuning-lstm": PromptEncoderConfig(
        num_virtual_tokens=6, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", encoder_dropout=0.1
    ),
    "houlsby": BottleneckAdapterConfig("houlsby", dropout=0.1),
    "parallel": BottleneckAdapterConfig("parallel", scaling="learned"),
    "full-frozen-embeddings": FullConfig(freeze=["embed_tokens"]),
}
methods = pytest.mark.parametrize("name", list(METHODS))


def make(name: str, quantised: bool = False) -> Any:
    base: nn.Module = tiny_mixture() if name == "experts" else tiny_llama()
    torch.manual_seed(8)
    return get_peft_model(quantize(base) if quantised else base, METHODS[name])


@methods
def test_a_resumed_run_is_the_uninterrupted_one(make_trainer: MakeTrainer, name: str) -> None:
    """Stock P-tuning went on from a random encoder, since checkpoints did not hold the trained one."""
    options: dict[str, Any] = {"max_steps": 8, "save_steps": 4, "save_strategy": "steps", "learning_rate": 1e-2}
    quantised = not name.startswith("full")
    whole = make_trainer(make(name, quantised), **options)
    whole.train()
    assert sum(losses_of(whole)[-2:]) < sum(losses_of(whole)[:2])
    again = make_trainer(make(name, quantised), **options)
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-4")
    assert losses_of(again)[-4:] == losses_of(whole)[-4:]
    assert_equal_weights(weights_of(whole.model), weights_of(again.model))


@pytest.mark.parametrize("name", ["ia3", "prompt", "p-tuning", "houlsby", "shared-a"])
def test_an_accelerated_model_learns_the_same(make_trainer: MakeTrainer, rows: Any, name: str) -> None:
    runs = []
    for accelerated in (False, True):
        model = make(name)
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        trainer = make_trainer(
            fastpeft.accelerate(model) if accelerated else model,
            f"run-{accelerated}",
            eval_dataset=rows,
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.train()
        runs.append(trainer)
    plain, fused = runs
    assert losses_of(fused) == pytest.approx(losses_of(plain), rel=1e-4)
    for key in ("mean_token_accuracy", "eval_loss", "eval_mean_token_accuracy", "num_tokens"):
        values = [[line[key] for line in run.state.log_history if key in line] for run in runs]
        assert values[0] and values[1] == pytest.approx(values[0], rel=1e-4)


def test_virtual_tokens_count_in_the_length_limit(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(make("prompt"), max_length=20)
    longest = max(len(item["input_ids"]) for item in trainer.train_dataset)
    assert longest == 14
    with pytest.raises(UserError, match="6 virtual tokens leave 4 of max_length 10"):
        make_trainer(make("prompt"), max_length=10)


def test_lora_plus_trains_b_faster(make_trainer: MakeTrainer) -> None:
    moves = {}
    for ratio in (1, 16):
        model = make("embedding")
        before = weights_of(model)
        groups = lora_plus_groups(model, 1e-3, ratio, weight_decay=0.1, embedding_lr=1e-4)
        assert {group["lr"] for group in groups} == {1e-3, 1e-3 * ratio, 1e-4}
        trainer = make_trainer(model, optimizers=(AdamW(groups), None))
        trainer.train()
        after = weights_of(model)
        moves[ratio] = {n: float((after[n] - before[n]).norm()) for n in after if "lora_B" in n}
    assert all(moves[16][n] > 5 * moves[1][n] for n in moves[1])
    with pytest.raises(UserError, match="no LoRA that trains"):
        lora_plus_groups(make("ia3"), 1e-3, 16)
    with pytest.raises(UserError, match="ratio=0; must be a number above 0"):
        lora_plus_groups(model, 1e-3, 0)
