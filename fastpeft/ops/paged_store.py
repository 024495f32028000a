"""Keys and values of many tokens into pages, where `paged_attention` reads them: what a prompt pass needs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops import native


def _strided(x: Tensor) -> tuple[int, int, int]:
    """Address and strides of tokens and heads."""
    return x.data_ptr(), x.stride(1), x.stride(0)


def _paged_store(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, pages: Tensor, offsets: Tensor) -> None:
    kv_heads, tokens, dim = k.shape
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    native.call(
        "paged_store",
        k,
        _strided(k),
        _strided(v),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        pages.data_ptr(),
        offsets.data_ptr(),
        native.dtype_number("paged_store_", k.dtype),
        tokens,
        kv_heads,
        dim,
        k_pages.shape[2],
        k_pages.shape[0],
    )


native.define(
    "paged_store(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor pages, Tensor offsets) -> ()",
    _paged_store,
    lambda *_: None,
)


@torch.no_grad()
def paged_store_(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, pages: Tensor, offsets: Tensor) -> None:
    """Write keys and values into pages: ``k_pages[pages[i], :, offsets[i]] = k[:, i]``, and ``v`` alike.

    Args:
        k: ``(kv_heads, t, d)``, float32, float16 or bfloat16; copied first where its last stride is not 1.
        v: as ``k``.
        k_pages: ``(pages, kv_heads, page_size, d)``, written in place.
        v_pages: as ``k_pages``.
        pages: ``(t,)`` int32, the page of each token; below 0 the token is not stored.
        offsets: ``(t,)`` int32, its place in the page. Tokens that are stored have different places.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or, on the CPU, a place that is not there; on CUDA such a
            token is not stored.
    """
    if k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"paged_store_: k has shape {tuple(k.shape)} and v {tuple(v.shape)}; both must be (kv_heads, t, d)"
        )
    kv_heads, tokens, dim = k.shape
    if k_pages.dim() != 4 or k_pages.shape != v_pages.shape or (k_pages.shape[1], k_pages.shape[3]) != (kv_heads, dim):
        raise ValueError(
            f"paged_store_: pages have shapes {tuple(k_pages.shape)} and {tuple(v_pages.shape)}; they must be "
            f"(pages, {kv_heads}, page_size, {dim})"
        )
    if not k_pages.is_contiguous() or not v_pages.is_contiguous():
        raise ValueError("paged_store_: pages must be contiguous, as they are written in place")
    if len({x.dtype for x in (k, v, k_pages, v_pages)}) > 1:
        raise ValueError("paged_store_: k, v and the pages must have one dtype")
    for name, x in (("pages", pages), ("offsets", offsets)):
        if x.shape != (tokens,) or x.dtype != torch.int32:
            raise ValueError(
                f"paged_store_: {name} is {x.dtype} of shape {tuple(x.shape)}; it must be torch.int32, ({tokens},)"
            )
    if any(other.device != k.device for other in (v, k_pages, v_pages, pages, offsets)):
        raise ValueError(f"paged_store_: k is on {k.device}; all tensors must be there")
    torch.ops.fastpeft.paged_store(k, v, k_pages, v_pages, pages.contiguous(), offsets.contiguous())
