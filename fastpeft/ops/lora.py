"""LoRA linear over a dense or an NF4 base: ``y = x W^T + s (drop(x) A^T) B^T + bias``.

Kept for backward are x and ``drop(x) A^T`` only: the dropped x is made again from its seed. A and B are float32 master
weights; they are cast to the dtype of x here, once a call, and their gradients come back in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops.dropout import new_seed
from fastpeft.ops.nf4 import autocast, check_linear
from fastpeft.ops.nf4_weight import NF4Weight

# A dense weight comes as `weight` alone; an NF4 weight as its codes and the operands that follow.
_BASE = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_map, Tensor? offset, "
    "int block_size, SymInt n, SymInt k"
)


def _base_product(x: Tensor, base: tuple[Any, ...], bias: Tensor | None) -> Tensor:
    if base[1] is None:
        return torch.nn.functional.linear(x, base[0].to(x.dtype), bias)
    y: Tensor = torch.ops.fastpeft.nf4_linear(x, *base, bias)
    return y


def _base_dx(dy: Tensor, base: tuple[Any, ...]) -> Tensor:
    dx: Tensor = dy @ base[0].to(dy.dtype) if base[1] is None else torch.ops.fastpeft.nf4_linear_dx(dy, *base)
    return dx


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if seed is None or p == 0.0:
        return x
    out: Tensor = torch.ops.fastpeft.dropout(x, p, seed)
    return out


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *base, a, b, scale, bias, p, seed = rest
    n, k = base[-2:]
    x2d = x.reshape(-1, k)
    xa = _dropped(x2d, p, seed) @ a.to(x.dtype).t()
    y = _base_product(x2d, tuple(base), bias)
    y.addmm_(xa, b.to(x.dtype).t(), alpha=scale)
    return y.reshape(*x.shape[:-1], n), xa


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, a = rest[6], rest[8]
    tokens = x.numel() // x.shape[-1]
    return x.new_empty((*x.shape[:-1], n)), x.new_empty((tokens, a.shape[0]))


def _backward(dy: Tensor, x: Tensor, xa: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *base, a, b, scale, p, seed, want_dx, want_dab = rest
    n, k = base[-2:]
    dy2d, x2d = dy.reshape(-1, n), x.reshape(-1, k)
    dxa = (dy2d @ b.to(dy.dtype)) * scale
    da, db = a.new_empty((0,)), b.new_empty((0,))
    if want_dab:
        da = (dxa.t() @ _dropped(x2d, p, seed)).to(a.dtype)
        db = (dy2d.t() @ xa).to(b.dtype) * scale
    if not want_dx:
        return dy.new_empty((0,)), da, db
    dx = _base_dx(dy2d, tuple(base))
    dx += _dropped(dxa @ a.to(dy.dtype), p, seed)
    return dx.reshape(x.shape), da, db


def _backward_fake(dy: Tensor, x: Tensor, xa: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, b, (want_dx, want_dab) = rest[8], rest[9], rest[-2:]
    dx = dy.new_empty(x.shape if want_dx else (0,))
    return dx, a.new_empty(a.shape if want_dab else (0,)), b.new_empty(b.shape if want_dab else (0,))


native.define(
    f"lora_linear(Tensor x, {_BASE}, Tensor a, Tensor b, float scale, Tensor? bias, float p, Tensor? seed) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
native.define(
    f"lora_linear_backward(Tensor dy, Tensor x, Tensor xa, {_BASE}, Tensor a, Tensor b, float scale, float p, "
    "Tensor? seed, bool want_dx, bool want_dab) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scale: float,
        p: float,
        seed: Tensor | None,
        *base: Any,
    ) -> Tensor:
        y, xa = torch.ops.fastpeft.lora_linear(x, *base, a, b, scale, bias, p, seed)
        ctx.save_for_backward(x, xa, a, b, seed, *base[:5])
        ctx.constants = (scale, p, base[5:])
        out: Tensor = y
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, a, b, seed, *tensors = ctx.saved_tensors
        scale, p, sizes = ctx.constants
        want_dx, want_da, want_db = ctx.needs_input_grad[:3]
        wanted = (want_dx, want_da or want_db)
        dx, da, db = torch.ops.fastpeft.lora_linear_backward(dy, x, xa, *tensors, *sizes, a, b, scale, p, seed, *wanted)
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return dx if want_dx else None, da if want_da else None, db if want_db else None, dbias, *(None,) * 11


def lora_linear(
    x: Tensor,
    w: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Apply a frozen linear layer with a low-rank update: ``x @ w.T + scale * (drop(x) @ a.T) @ b.T + bias``.

    Differentiable in ``x``, ``a``, ``b`` and ``bias``; the base weight is frozen.

    Args:
        x: ``(..., k)``, float32, float16 or bfloat16; under autocast it is cast to autocast's dtype.
        w: ``(n, k)``, dense or NF4.
        a: ``(r, k)``, the down-projection; float32 under a 16-bit x is the usual case.
        b: ``(n, r)``, the up-projection.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        bias: ``(n,)`` of the base layer.
        dropout: probability that an element of x is left out of the low-rank path; the mask is made again in backward
            from a seed of torch's CPU generator.
        training: dropout is applied only when true.
    Returns:
        ``(..., n)``, dtype of ``x``; accumulated in float32.
    Raises:
        ValueError: shapes that do not fit, tensors on different devices, or a dropout outside [0, 1).
    Source:
        LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732.
    """
    n, k = w.shape
    check_linear("lora_linear", x, n, k, w.device, bias)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != k or b.shape[0] != n or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"lora_linear: a has shape {tuple(a.shape)} and b {tuple(b.shape)}; "
            f"a weight of ({n}, {k}) needs (r, {k}) and ({n}, r)"
        )
    if a.device != x.device or b.device != x.device:
        raise ValueError(f"lora_linear: x is on {x.device}, a on {a.device} and b on {b.device}; move them together")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora_linear: dropout is {dropout}; it must be at least 0 and below 1")
    x = autocast(x)
    bias = None if bias is None else bias.to(x.dtype)
    dropout = dropout if training else 0.0
    seed = new_seed() if dropout > 0.0 else None
    base = (*w.operands, n, k) if isinstance(w, NF4Weight) else (w, None, None, None, None, 0, n, k)
    out: Tensor = _LoRALinear.apply(x, a, b, bias, scale, dropout, seed, *base)  # type: ignore[no-untyped-call]
    return out
