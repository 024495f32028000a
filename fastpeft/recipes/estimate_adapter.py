"""What a method trains in a model, by the closed formulas of the methods' docstrings; nothing is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fastpeft.methods import (
    AdapterConfig,
    BottleneckAdapterConfig,
    FullConfig,
    IA3Config,
    LoraConfig,
    PromptEncoderConfig,
)
from fastpeft.methods.full import train_fully
from fastpeft.methods.inject import plan_adapter
from fastpeft.methods.lora import layers_of_one_input
from fastpeft.methods.prompts import PromptConfig
from fastpeft.methods.targets import matches
from fastpeft.nn.base_weight import sizes
from fastpeft.nn.lora_init import begins_in_base

# What backward finds saved: the inputs of linear layers, which adapters in them and trained weights need; nothing but
# what the base itself needs; what (IA)^3 scales, too; or outputs of products, or the inside of whole layers, since DoRA
# keeps products and hooks keep layers from being replayed.
Saves = Literal["inputs", "nothing", "scaled", "dora", "whole layer"]


@dataclass(frozen=True)
class Trained:
    """What trains.

    Attributes:
        numbers: how many.
        added: of these, how many are the adapter's, in fp32, and not the model's own.
        beside: bytes that the adapter keeps besides.
        virtual_tokens: that each sequence gets in front.
        saves: what backward of a layer needs.
        sites: of bottleneck adapters.
        largest: numbers of a parameter of the embedding or the head, where these train.
        beside_experts: whether adapters are beside a mixture's experts.
    """

    numbers: int
    added: int
    beside: int = 0
    virtual_tokens: int = 0
    saves: Saves = "inputs"
    sites: int = 0
    largest: int = 0
    beside_experts: bool = False


def trained(model: nn.Module, config: AdapterConfig) -> Trained:
    """Count what a configuration trains.

    LoRA: r (k + n) for a weight ``(n, k)``, each expert's too, n more with DoRA, r (v + d) for an embedding; (IA)^3: n,
    or k of a feed-forward layer; prompt tuning: v d; P-tuning: the encoder of `fastpeft.nn.prompt`; a bottleneck's
    site: 2 b d + b + d, 2 d more for each LayerNorm and 1 for a learned scaling; full: p.

    Args:
        model: a skeleton of the model.
        config: the method.
    Raises:
        UserError: the configuration does not fit the model.
    """
    if isinstance(config, FullConfig):
        return _full(model, config)
    plan = plan_adapter(model, config)
    saved = sum(p.numel() for name in plan.modules_to_save for p in model.get_submodule(name).parameters())
    width = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
    if isinstance(config, PromptConfig):
        count = config.num_virtual_tokens
        numbers = _encoder(config, width) if isinstance(config, PromptEncoderConfig) else count * width
        return Trained(numbers + saved, numbers, virtual_tokens=count, saves="nothing")
    if isinstance(config, BottleneckAdapterConfig):
        b = config.bottleneck_of(width)
        site = 2 * b * width + b + width + 2 * width * (bool(config.ln_before) + bool(config.ln_after))
        numbers = len(plan.targets) * (site + (config.scaling == "learned"))
        return Trained(numbers, numbers, saves="whole layer", sites=len(plan.targets))
    if isinstance(config, IA3Config):
        shapes = {name: sizes(model.get_submodule(name)) for name in plan.targets}
        numbers = sum(k if matches(plan.config.feedforward_modules, name) else n for name, (n, k) in shapes.items())
        return Trained(numbers + saved, numbers, saves="scaled")
    assert isinstance(config, LoraConfig)
    return _lora(model, plan, saved)


def _lora(model: nn.Module, plan: Any, saved: int) -> Trained:
    config: LoraConfig = plan.config
    numbers = beside = 0
    follows = {name for group in layers_of_one_input(plan) for name in group[1:]} if config.shared_a else set()
    for name in plan.targets:
        module, r = model.get_submodule(name), config.rank_of(name)
        if isinstance(module, nn.Embedding):
            v, d = module.num_embeddings, module.embedding_dim
            numbers += r * (v + d) + (d if config.use_dora else 0)
            beside += 4 * d if config.use_dora else 0
            continue
        n, k = sizes(module)
        numbers += r * (n + (0 if name in follows else k)) + (n if config.use_dora else 0)
        beside += 4 * n if config.use_dora else 0
        beside += 4 * r * (n + k) if begins_in_base(config.init_lora_weights) else 0
    for name in plan.parameters:
        path, _, weight = name.rpartition(".")
        count, n, k = model.get_submodule(path).get_parameter(weight).shape
        numbers += config.rank_of(name) * count * (n + k)
    saves: Saves = "dora" if config.use_dora else "inputs"
    experts = bool(plan.parameters)
    return Trained(numbers + saved, numbers, beside, saves=saves, largest=saved, beside_experts=experts)


def _full(model: nn.Module, config: FullConfig) -> Trained:
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        train_fully(model, config)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        chosen = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and name not in tied}
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    ends = [n for name, n in chosen.items() if "embed" in name or name.startswith(("lm_head", "transformer.wte"))]
    return Trained(sum(chosen.values()), 0, largest=max(ends, default=0))


def _encoder(config: PromptEncoderConfig, d: int) -> int:
    """Numbers of a P-tuning encoder of v tokens and hidden size h, as `fastpeft.nn.prompt` has them."""
    v, h = config.num_virtual_tokens, config.encoder_hidden_size or d
    kind = config.encoder_reparameterization_type
    if kind == "NEMO":
        e = config.encoder_embedding_dim or h
        return v * e + e * h + h + h * d + d
    if kind == "LSTM":
        inputs = [d] + [2 * h] * (config.encoder_num_layers - 1)
        return v * d + sum(8 * h * (width + h + 2) for width in inputs) + 4 * h * h + 2 * h + 2 * h * d + d
    return v * d + h * (2 * d + h) + 2 * h + d
