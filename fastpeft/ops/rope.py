"""Rotary position embedding of queries and keys: one launch forward, one backward, nothing stored but the angles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native


def _heads_inside(x: Tensor) -> bool:
    """Whether ``(b, h, t, d)`` lies in memory as ``(b, t, h, d)``, as a transposed view of a projection does."""
    return x.stride(1) < x.stride(2)


def _like(x: Tensor, heads_inside: bool) -> Tensor:
    """A dense tensor in either order; made with its strides, as a view could not be changed in place afterwards."""
    b, h, t, d = x.shape
    strides = (t * h * d, d, h * d, 1) if heads_inside else (h * t * d, t * d, d, 1)
    return x.new_empty_strided((b, h, t, d), strides)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(x: Tensor) -> tuple[int, int, int]:
    """Address, batch stride and token stride."""
    return x.data_ptr(), 0 if x.shape[0] == 1 else x.stride(0), x.stride(1)


def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_heads_inside: bool, k_heads_inside: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    outs = _like(q, q_heads_inside), _like(k, k_heads_inside)
    q, k = _last_contiguous(q), _last_contiguous(k)  # named, so that copies live until the call
    sides: list[Any] = []
    for x, out in zip((q, k), outs, strict=True):
        sides += [x.data_ptr(), out.data_ptr(), x.shape[1], x.stride()[:3], out.stride()[:3]]
    cos, sin = _last_contiguous(cos), _last_contiguous(sin)
    native.call(
        "rope",
        q,
        *sides,
        *_angles(cos),
        *_angles(sin),
        native.dtype_number("rope", q.dtype),
        native.dtype_number("rope", cos.dtype),
        q.shape[0],
        q.shape[2],
        q.shape[3],
        cos.shape[-1],
        backward,
    )
    return outs


def _rope_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_heads_inside: bool, k_heads_inside: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    return _like(q, q_heads_inside), _like(k, k_heads_inside)


native.define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool q_heads_inside, bool k_heads_inside, bool backward) "
    "-> (Tensor, Tensor)",
    _rope,
    _rope_fake,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        # Gradients lie as q and k did, so that the views before them need no copy.
        ctx.order = (_heads_inside(q), _heads_inside(k))
        out: tuple[Tensor, Tensor] = torch.ops.fastpeft.rope(q, k, cos, sin, *ctx.order, False)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = torch.ops.fastpeft.rope(dq, dk, *ctx.saved_tensors, *ctx.order, True)
        return dq, dk, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their positions: ``x * cos + rotate_half(x) * sin`` in transformers.

    Differentiable in ``q`` and ``k``. Each element is computed in float32 and rounded once; transformers rounds both
    products and their sum.

    Args:
        q: ``(b, heads, t, d)``, float32, float16 or bfloat16, any strides; a transposed ``(b, t, heads, d)`` is usual.
        k: ``(b, kv_heads, t, d)``, dtype of ``q``.
        cos: ``(1 or b, t, rotary)``, float32 or the dtype of ``q``; ``rotary`` is even and at most ``d``. Elements of
            a head from ``rotary`` on are passed through.
        sin: as ``cos``.
    Returns:
        The rotated queries and keys, each dense, with heads and tokens in the order its input has in memory.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    Source:
        RoFormer, arXiv 2104.09864.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"rope: q has shape {tuple(q.shape)} and k {tuple(k.shape)}; they must be (b, heads, t, d) "
            "and alike but in heads"
        )
    b, _, t, d = q.shape
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[0] not in (1, b) or cos.shape[1] != t:
        raise ValueError(
            f"rope: cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; both must be (1 or {b}, {t}, rotary)"
        )
    if cos.shape[2] > d or cos.shape[2] % 2:
        raise ValueError(f"rope: cos has {cos.shape[2]} columns; it must be an even number, at most {d}")
    if len({q.device, k.device, cos.device, sin.device}) > 1:
        raise ValueError(
            f"rope: q is on {q.device}, k on {k.device}, cos on {cos.device} and sin on {sin.device}; "
            "move them together"
        )
    if k.dtype != q.dtype:
        raise ValueError(f"rope: q is {q.dtype} and k {k.dtype}; they must have one dtype")
    if cos.dtype != sin.dtype or cos.dtype not in (q.dtype, torch.float32):
        cos, sin = cos.float(), sin.float()
    out: tuple[Tensor, Tensor] = _Rope.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return out
