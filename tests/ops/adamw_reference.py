"""AdamW in float64, element by element as its formula stands, and 8-bit state by a search over the whole map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.adamw import BLOCK, dynamic_map

HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def step_in(
    dtype: torch.dtype,
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    factor: float = 1.0,
    maximize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters and moments after one step, computed in ``dtype``."""
    lr, (beta1, beta2), eps, decay = HYPER["lr"], HYPER["betas"], HYPER["eps"], HYPER["weight_decay"]
    p, g, m, v = (tensor.to(dtype) for tensor in (p, g, m, v))
    g = g * factor * (-1 if maximize else 1)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    return p * (1 - lr * decay) - lr / (1 - beta1**step) * m / denominator, m, v


def blocks(values: Tensor) -> Tensor:
    """A row of numbers as ``(blocks, 256)``, the last filled up with zeros."""
    padded = values.new_zeros(-(-values.numel() // BLOCK) * BLOCK)
    padded[: values.numel()] = values.flatten()
    return padded.view(-1, BLOCK)


def decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Values of 8-bit state in float64."""
    values = dynamic_map(signed).to(codes.device)[codes.long()].double()
    return (blocks(values) * absmax.double()[:, None]).flatten()[: codes.numel()]


# Two values of a map as near to one: what float32 makes of the scaled value decides.
TIE = 4 * torch.finfo(torch.float32).eps


def excess(codes: Tensor, absmax: Tensor, exact: Tensor, signed: bool) -> float:
    """By how much codes are farther from the exact values than the nearest of the map, relative to their scales."""
    if exact.numel() == 0:
        return 0.0
    scaled = (blocks(exact.double()) / absmax.double()[:, None].clamp_min(1e-300)).flatten()[: exact.numel()]
    values = dynamic_map(signed).to(codes.device).double()
    nearest = (scaled[:, None] - values).abs().amin(1)
    off = (scaled - values[codes.long()]).abs() - nearest
    if not signed:
        off[(codes == 1) & (exact > 0)] = 0.0  # a second moment above zero never becomes zero
    return float(off.max())
