"""Tiny random models of several families, and every method as a configuration for each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastpeft.methods import (
    AdapterConfig,
    BottleneckAdapterConfig,
    IA3Config,
    LoraConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

VOCABULARY = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen3": {**_SIZES, "head_dim": 16},
    "gemma3_text": {**_SIZES, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt2": _GPT2,
    "mixtral": {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
}

METHODS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1),
    "rslora": LoraConfig(r=4, target_modules="all-linear", use_rslora=True),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "pissa": LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa"),
    "olora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights="olora"),
    "shared-a": LoraConfig(r=4, target_modules="all-linear", shared_a=True),
    "ia3": IA3Config(),
    "prompt": PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning-mlp": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=24),
    "p-tuning-lstm": PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=24, encoder_reparameterization_type="LSTM"
    ),
    "p-tuning-nemo": PromptEncoderConfig(
        num_virtual_tokens=5,
        encoder_hidden_size=24,
        encoder_embedding_dim=20,
        encoder_reparameterization_type="NEMO",
    ),
    "houlsby": BottleneckAdapterConfig("houlsby", dropout=0.1),
    "pfeiffer": BottleneckAdapterConfig("pfeiffer", ln_before=True, ln_after=True),
    "parallel": BottleneckAdapterConfig("parallel", scaling="learned"),
    "nemo-parallel": BottleneckAdapterConfig("parallel_adapter"),
    "nemo-linear": BottleneckAdapterConfig("linear_adapter", init_weights="bert"),
}
NO_MERGE = ("prompt", "p-tuning", "houlsby", "pfeiffer", "parallel", "nemo")


def tiny(family: str = "llama", **changes: Any) -> nn.Module:
    """The same random model at every call, in evaluation mode."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def moved(model: nn.Module, seed: int = 5) -> nn.Module:
    """Move every trainable value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def logits(model: nn.Module, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, **options).logits


def train(model: nn.Module, input_ids: torch.Tensor, steps: int = 4, seed: int = 3) -> list[float]:
    """Losses of some steps of AdamW on one batch."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
