"""Liger's fused linear cross-entropy: chunks of tokens, gradients made in forward."""

from __future__ import annotations

from torch import Tensor

from bench.case import require


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Loss of a linear head."""
    require("liger_kernel")
    function = require("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    # bias, class weights, ignore_index, z-loss, label smoothing, reduction
    loss: Tensor = function.apply(hidden, weight, target, None, None, -100, 0.0, 0.0, reduction)[0]
    return loss
