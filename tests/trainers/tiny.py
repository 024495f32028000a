"""A Llama of 100,000 parameters, with and without adapters, and what tests compare of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from fastpeft.methods import LoraConfig, get_peft_model
from fastpeft.models import quantize
from fastpeft.trainers import SFTTrainer

_SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).to(dtype)


def tiny_mixture() -> MixtralForCausalLM:
    torch.manual_seed(7)
    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2))


def tiny_lora(quantized: bool = False, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: nn.Module = tiny_llama(dtype)
    if quantized:
        model = quantize(model)
    torch.manual_seed(8)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    return get_peft_model(model, config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "full": tiny_llama,
    "lora": tiny_lora,
    "lora-nf4": lambda: tiny_lora(quantized=True),
}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, f"{len(differing)} of {len(one)} parameters differ, e.g. {differing[0]}"


def losses_of(trainer: SFTTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
