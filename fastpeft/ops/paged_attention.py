"""Attention of one new token a row over keys and values in pages: what a decoding step needs, in one launch.

The new key is rotated where angles are given, joins the cache together with its value, and is attended to like those
before it. Nothing here is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native


def _strided(x: Tensor) -> tuple[int, int, int]:
    """Address and strides of rows and heads."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def _paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    rows, heads, dim = q.shape
    kv_heads, page_size, row_pages = k.shape[1], k_pages.shape[2], table.shape[1]
    out = q.new_empty(rows, heads, dim)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    parts, partial, counters = 1, None, None
    if q.is_cuda:
        sizes = (rows, heads, kv_heads, dim, row_pages * page_size)
        parts, floats, words = native.paged_attention_plan(*sizes, q.device)
        if parts > 1:
            partial = q.new_empty(floats, dtype=torch.float32)
            counters = native.counters(words, q.device)
    native.call(
        "paged_attention",
        q,
        _strided(q),
        _strided(k),
        _strided(v),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        table.data_ptr(),
        lengths.data_ptr(),
        native.address(cos),
        native.address(sin),
        out.data_ptr(),
        native.dtype_number("paged_attention", q.dtype),
        rows,
        heads,
        kv_heads,
        dim,
        0 if cos is None else cos.shape[-1],
        page_size,
        row_pages,
        window,
        scale,
        softcap,
        parts,
        native.address(partial),
        native.address(counters),
    )
    return out


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


native.define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor table, "
    "Tensor lengths, Tensor? cos, Tensor? sin, float scale, float softcap, int window) -> Tensor",
    _paged_attention,
    _fake,
)


@torch.no_grad()
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    angles: tuple[Tensor, Tensor] | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Attend with one new token a row to all tokens of its row, after its key and value have joined them.

    ``softmax(scale * q k^T) v`` over the last ``window`` tokens, the new one included; float32 sums.

    Args:
        q: ``(rows, heads, d)``, float32, float16 or bfloat16; on CUDA ``d`` is a multiple of 16 bytes,
            at most 512 bytes.
        k: ``(rows, kv_heads, d)`` of the new tokens; ``heads`` is a multiple of ``kv_heads``.
        v: as ``k``.
        k_pages: ``(pages, kv_heads, page_size, d)``, written in place; ``page_size`` is a power of two.
        v_pages: as ``k_pages``.
        table: ``(rows, row_pages)`` int32, the pages of each row in the order of its tokens; those of different rows
            differ where they are written.
        lengths: ``(rows,)`` int32 of tokens that are there already; below 0 the row is idle, its output zero.
        scale: factor of the scores.
        angles: cosines and sines of the new tokens' positions, ``(rows, rotary)`` each; None leaves q and k as they
            are. ``rotary`` is even and at most ``d``.
        softcap: bounds the scores, ``softcap * tanh(score / softcap)``; 0 does not.
        window: tokens that are attended to; 0 for all.
    Returns:
        ``(rows, heads, d)``, dtype of ``q``.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or, on the CPU, a row without room.
    Source:
        PagedAttention, arXiv 2309.06180; Flash-Decoding.
    """
    rows, _, dim = _shape("q", q, 3)
    kv_heads = _shape("k", k, 3)[1]
    if k.shape != v.shape or k.shape[0] != rows or k.shape[2] != dim:
        raise ValueError(
            f"paged_attention: q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}; they must be "
            "(rows, heads, d), k and v with heads of their own"
        )
    pages = _shape("k_pages", k_pages, 4)
    if k_pages.shape != v_pages.shape or (pages[1], pages[3]) != (kv_heads, dim):
        raise ValueError(
            f"paged_attention: pages have shapes {tuple(k_pages.shape)} and {tuple(v_pages.shape)}; they must be "
            f"(pages, {kv_heads}, page_size, {dim})"
        )
    if not k_pages.is_contiguous() or not v_pages.is_contiguous():
        raise ValueError("paged_attention: pages must be contiguous, as they are written in place")
    if table.dim() != 2 or table.shape[0] != rows or lengths.shape != (rows,):
        raise ValueError(
            f"paged_attention: the table has shape {tuple(table.shape)} and lengths {tuple(lengths.shape)}; they must "
            f"be ({rows}, row_pages) and ({rows},)"
        )
    if table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise ValueError(f"paged_attention: table is {table.dtype} and lengths {lengths.dtype}; both must be int32")
    if len({x.dtype for x in (q, k, v, k_pages, v_pages)}) > 1:
        raise ValueError("paged_attention: q, k, v and the pages must have one dtype")
    cos, sin = (None, None) if angles is None else (angle.to(q.dtype).contiguous() for angle in angles)
    if cos is not None and sin is not None and (cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != rows):
        raise ValueError(
            f"paged_attention: angles have shapes {tuple(cos.shape)} and {tuple(sin.shape)}; both must be "
            f"({rows}, rotary)"
        )
    others = [k, v, k_pages, v_pages, table, lengths, *(angle for angle in (cos, sin) if angle is not None)]
    if any(other.device != q.device for other in others):
        raise ValueError(f"paged_attention: q is on {q.device}; all tensors must be there")
    out: Tensor = torch.ops.fastpeft.paged_attention(
        q, k, v, k_pages, v_pages, table.contiguous(), lengths.contiguous(), cos, sin, scale, softcap, window
    )
    return out


def _shape(name: str, x: Tensor, dims: int) -> tuple[int, ...]:
    if x.dim() != dims:
        raise ValueError(f"paged_attention: {name} has shape {tuple(x.shape)}; it must have {dims} dimensions")
    return tuple(x.shape)
