"""Linear layers in two halves, for recomputation: the product once, and its autograd node as often as it is needed.

Recomputing a layer for its backward needs the inputs of its products, not always their outputs. The functions here take
a product that was computed before, or none where nobody reads the output, and put the node into the graph around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.lora import LoRANode, layers
from fastpeft.ops.nf4 import autocast
from fastpeft.ops.nf4_weight import NF4Weight

_BASE_OPERANDS = 8  # weight or codes, four tensors and a size of an NF4 weight, n, k


def _operands(w: Tensor | NF4Weight) -> tuple[Any, ...]:
    n, k = w.shape
    return (*w.operands, n, k) if isinstance(w, NF4Weight) else (w, None, None, None, None, 0, n, k)


def unread(x: Tensor, n: int) -> Tensor:
    """A stand-in for an output that nobody reads: ``(..., n)``, one element of memory, no defined value."""
    return x.new_empty(()).expand(*x.shape[:-1], n)


def lora_product(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
    dropout: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Compute LoRA linear layers that share x outside of autograd.

    Args:
        x: ``(..., k)``; under autocast it is cast to autocast's dtype.
        weights: ``(n, k)`` each, dense or NF4.
        a: ``(r, k)`` each.
        b: ``(n, r)`` each.
        scales: of the low-rank terms.
        biases: ``(n,)`` each or None.
        dropout: probability; 0 without a seed.
        seed: of the dropout mask.
    Returns:
        The outputs ``(..., n)`` and xa, ``drop(x) a^T`` of all layers, which backward reads.
    """
    x = autocast(x)
    these = layers(x.dtype, weights, a, b, scales, biases, dropout)
    *ys, xa = torch.ops.fastpeft.lora_linear(x, *these.arguments(seed), these.split(these.tensors)[1][2])
    return ys, xa


class _BaseNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, *rest[:4])
        ctx.sizes, ctx.shape = rest[4:], x.shape
        return y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        want_dx, want_dw, want_dbias = ctx.needs_input_grad[:3]
        dy2d = dy.reshape(-1, dy.shape[-1])
        dx = None
        if want_dx and tensors[0] is None:
            dx = (dy2d @ weight.to(dy.dtype)).reshape(ctx.shape)
        elif want_dx:
            dx = torch.ops.fastpeft.nf4_linear_dx(dy2d, weight, *tensors, *ctx.sizes).reshape(ctx.shape)
        dw = (dy2d.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if want_dw else None
        return dx, dw, dy2d.sum(0) if want_dbias else None, *(None,) * _BASE_OPERANDS


def lora_node(
    x: Tensor,
    ys: Sequence[Tensor],
    xa: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """Put the node of `lora_linear_group` around what `lora_product` gave.

    Args:
        x: the same input, in the graph.
        ys: the outputs, or `unread`.
        xa: as `lora_product` gave it.
        weights: as in `lora_product`, like all that follow.
        a: ``(r, k)`` each.
        b: ``(n, r)`` each.
        scales: of the low-rank terms.
        biases: ``(n,)`` each or None.
        dropout: probability.
        seed: of the dropout mask.
    Returns:
        ``ys`` in the graph, differentiable in ``x``, ``a``, ``b`` and ``biases``.
    """
    x = autocast(x)
    these = layers(x.dtype, weights, a, b, scales, biases, dropout)
    return list(LoRANode.apply(x, seed, (ys, xa), these.constants, *these.tensors))  # type: ignore[no-untyped-call]


def base_node(x: Tensor, y: Tensor, w: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
    """Put the node of a plain linear layer around its output.

    Args:
        x: the same input, in the graph.
        y: the output, or `unread`.
        w: ``(n, k)``; NF4, or dense and differentiable too.
        bias: ``(n,)`` or None.
    Returns:
        ``y`` in the graph.
    """
    x = autocast(x)
    weight, *rest = _operands(w)
    bias = None if bias is None else bias.to(x.dtype)
    out: Tensor = _BaseNode.apply(x, weight, bias, y, *rest)  # type: ignore[no-untyped-call]
    return out
