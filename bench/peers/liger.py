"""Liger's Triton kernels, through their autograd functions.

RoPE writes over q and k, and over their gradients; the gated activations write their gradients over their inputs: the
caller hands out copies. The norms are told not to write over the gradient, which costs them no traffic.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from bench.case import require


def _function(module: str, name: str) -> Any:
    require("liger_kernel")
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = _function("rms_norm", "LigerRMSNormFunction").apply(x, weight, eps, 0.0, "llama", False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    function = _function("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    out: tuple[Tensor, Tensor] = function.apply(x, residual, weight, eps, 0.0, "llama", False)
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _function("rope", "LigerRopeFunction").apply(q, k, cos, sin)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out: Tensor = _function("swiglu", "LigerSiLUMulFunction").apply(gate, up)
    return out


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    out: Tensor = _function("geglu", "LigerGELUMulFunction").apply(gate, up)
    return out


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Loss of a linear head, by chunks of tokens, gradients made in forward."""
    function = _function("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    # bias, class weights, ignore_index, z-loss, label smoothing, reduction
    loss: Tensor = function.apply(hidden, weight, target, None, None, -100, 0.0, 0.0, reduction)[0]
    return loss
