"""Adapters on the output layer, under the loss that never holds the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.families import moved, tiny, tokens
from torch import nn

import fastpeft
from fastpeft.methods import IA3Config, LoraConfig, get_peft_model
from fastpeft.models import causal_lm, has_fused_loss

CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "dora": LoraConfig(r=4, target_modules=["lm_head"], use_dora=True),
    "ia3": IA3Config(target_modules=["lm_head", "v_proj"]),
    "whole": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def adapted(name: str, when: str, family: str = "llama") -> Any:
    model = tiny(family)
    if when == "before":
        fastpeft.accelerate(model)
    torch.manual_seed(2)
    model = moved(get_peft_model(model, CONFIGS[name]))
    if when == "after":
        fastpeft.accelerate(model)
    return model.train()


def step(model: nn.Module, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    labels = tokens().clone()
    labels[0, :4] = -100
    out = model(input_ids=tokens(), labels=labels, **options)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_loss_and_gradients_are_the_plain_models(
    name: str, family: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "_CHUNK_BYTES", 4 * 96 * 5)  # chunks of 5 tokens
    plain, grads = step(adapted(name, "never", family))
    model = adapted(name, when, family)
    assert has_fused_loss(model.get_base_model())
    fused, others = step(model)
    assert fused.logits is None and plain.logits is not None
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == others.keys() and any("lm_head" in key for key in grads)
    for key, grad in grads.items():
        torch.testing.assert_close(others[key], grad, rtol=1e-3, atol=1e-6, msg=key)
    counted, _ = step(model, num_items_in_batch=7, count_correct=True)
    assert counted.correct.item() >= 0
    torch.testing.assert_close(counted.loss * 7, plain.loss * 17, rtol=1e-4, atol=1e-4)


def test_dropout_of_the_head_is_the_same_in_backward() -> None:
    """Chunks are computed again in backward; with other masks the gradient would be another function's."""
    config = LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5)
    grads = []
    for accelerated in (False, True):
        model = moved(get_peft_model(tiny(), config)).train()
        if accelerated:
            fastpeft.accelerate(model)
        torch.manual_seed(5)
        grads.append(step(model)[1])
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-3, atol=1e-6, msg=key)


def test_no_more_than_a_chunk_of_logits_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "_CHUNK_BYTES", 4 * 96 * 5)
    model = adapted("lora", "after")
    head, rows = model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    step(model)
    assert max(rows) == 5 and sum(rows) == 2 * 22
