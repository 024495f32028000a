"""SFTTrainer on an accelerated model: no logits in training, the same losses and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from trainers.tiny import MODELS, losses_of, tiny_llama, tiny_lora

import fastpeft
from fastpeft.models.fused import CHECKPOINTING
from fastpeft.trainers import SFTTrainer

MakeTrainer = Callable[..., SFTTrainer]


def logged(trainer: SFTTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


# Without dropout: accelerated layers that share an input share a mask, plain ones draw one each.
STILL: dict[str, Callable[[], nn.Module]] = {
    "full": tiny_llama,
    "lora": lambda: tiny_lora(dropout=0.0),
    "lora-nf4": lambda: tiny_lora(quantized=True, dropout=0.0),
}


@pytest.mark.parametrize("kind", STILL)
def test_losses_and_metrics_are_those_of_the_plain_model(make_trainer: MakeTrainer, rows: Any, kind: str) -> None:
    options = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
    plain = make_trainer(STILL[kind](), "plain", **options)
    fused = make_trainer(fastpeft.accelerate(STILL[kind]()), "fused", **options)
    plain.train(), fused.train()
    assert losses_of(fused) == pytest.approx(losses_of(plain), rel=1e-4)
    for name in ("mean_token_accuracy", "num_tokens", "eval_loss", "eval_mean_token_accuracy"):
        assert len(logged(fused, name)) == len(logged(plain, name)) > 0
        assert logged(fused, name) == pytest.approx(logged(plain, name), rel=1e-4)


def test_accuracy_is_counted_in_the_steps_that_are_logged(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(fastpeft.accelerate(MODELS["lora"]()), logging_steps=3, max_steps=7)
    counted: list[bool] = []
    forward = trainer.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        counted.append(kwargs["count_correct"])
        out = forward(*args, **kwargs)
        assert out.logits is None
        return out

    trainer.model.forward = watched
    trainer.train()
    assert counted == [False, False, True, False, False, True, True]
    assert len(logged(trainer, "mean_token_accuracy")) == len(losses_of(trainer)) == 3


def test_gradient_checkpointing_is_ours(make_trainer: MakeTrainer) -> None:
    plain = make_trainer(fastpeft.accelerate(MODELS["lora-nf4"]()), "plain")
    recomputed = make_trainer(fastpeft.accelerate(MODELS["lora-nf4"]()), "full", gradient_checkpointing=True)
    plain.train(), recomputed.train()
    assert losses_of(plain) == losses_of(recomputed)
    layers = [module for module in recomputed.model.modules() if CHECKPOINTING in module.__dict__]
    assert len(layers) == 2


def test_mixed_precision(make_trainer: MakeTrainer) -> None:
    """transformers wraps the model's forward for it, and takes the wrapper off again."""
    plain = make_trainer("full", "plain", bf16=True)
    model = fastpeft.accelerate(MODELS["full"]())
    fused = make_trainer(model, "fused", bf16=True)
    plain.train(), fused.train()
    assert losses_of(fused) == pytest.approx(losses_of(plain), rel=2e-2)
    fastpeft.restore(model)
    assert isinstance(model, nn.Module) and model(input_ids=torch.tensor([[1, 5]])).logits is not None
