"""PEFT's LoRA layer over a bitsandbytes 4-bit linear.

The injected layer is called, not the model around it: PEFT's per-forward hooks are paid once a model, not once a
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench.case import Calls, require
from bench.peers.bnb import linear4bit
from bench.timing import forward_backward


class _OneLinear(nn.Module):
    """The smallest model PEFT can inject into."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def _lora_layer(w: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> tuple[nn.Module, list[Tensor]]:
    """PEFT's layer with these adapter values, in training mode, and its two trainable weights."""
    peft = require("peft")
    rank = a.shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=dropout, target_modules=["linear"])
    model = peft.get_peft_model(_OneLinear(linear4bit(w)), config)
    layer: nn.Module = model.base_model.model.linear.train()
    weight_a, weight_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index, union-attr]
    weight_a.data, weight_b.data = a.clone(), b.clone()
    return layer, [weight_a, weight_b]


def lora_step(
    xs: Sequence[Tensor],
    ws: Sequence[Tensor],
    dys: Sequence[Tensor],
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    autocast: bool,
) -> Calls:
    """Forward and backward by the input and both adapter weights.

    Args:
        xs: inputs, bf16.
        ws: base weights, bf16; quantised here.
        dys: gradients of the outputs.
        a: ``(r, k)`` adapter weight, in the dtype PEFT shall train.
        b: ``(n, r)`` adapter weight.
        scale: alpha over rank.
        dropout: probability.
        autocast: run the forward under bf16 autocast, as a trainer with ``bf16=True`` does for fp32 adapters.
    """

    def step(x: Tensor, w: Tensor, dy: Tensor) -> Callable[[], list[Tensor]]:
        layer, adapter = _lora_layer(w, a, b, scale, dropout)
        forward = partial(_autocast_forward, layer, x) if autocast else partial(layer, x)
        return forward_backward(forward, [x, *adapter], dy)

    return Calls(
        [step(x, w, dy) for x, w, dy in zip(xs, ws, dys, strict=True)],
        note="fp32 adapters under bf16 autocast" if autocast else "adapters cast to bf16",
    )


def _autocast_forward(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        out: Tensor = layer(x)
    return out
