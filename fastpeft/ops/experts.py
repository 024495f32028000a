"""What a mixture of experts needs beside its products: rows are sorted by expert, spread, and collected again.

    place, ends = route(ids, experts)
    y = nf4_linear_experts(spread_rows(x, place), w, ends)
    out = collect_rows(y, place, weights)

On CUDA each is one launch, which the host does not wait for, so that all can be captured. On the CPU they are torch's.
Spreading and collecting are each other's gradient, and the dots of rows are that of the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.ops import native

_MOST_EXPERTS = 1024  # of fastpeft::kMostRoutedExperts (csrc/include/fastpeft/experts.h)


class Routing(NamedTuple):
    """Where the rows of tokens stand when they are sorted by expert."""

    place: Tensor  # (t, top_k) int32: of each pair of a token and one of its experts
    ends: Tensor  # (experts,) int32: where each expert's rows end


# --- places ---
def _route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    if not ids.is_cuda or experts > _MOST_EXPERTS:
        return _route_by_torch(ids, experts)
    place, ends = _route_fake(ids, experts)
    ids = ids.contiguous()
    native.call_cuda("experts_route", ids, ids.data_ptr(), ids.numel(), experts, place.data_ptr(), ends.data_ptr())
    return place, ends


def _route_by_torch(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Ends are searched for, as torch's counts of bins would have the host wait for the device."""
    flat = ids.reshape(-1)
    keys, order = torch.where((flat >= 0) & (flat < experts), flat, experts).sort(stable=True)
    rows = torch.arange(flat.numel(), dtype=torch.int32, device=ids.device)
    place = torch.empty_like(rows).scatter_(0, order, rows).view(ids.shape)
    every = torch.arange(experts, device=ids.device)
    return place, torch.searchsorted(keys, every, right=True, out_int32=True)


def _route_fake(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.shape, dtype=torch.int32), ids.new_empty((experts,), dtype=torch.int32)


native.define("experts_route(Tensor ids, int experts) -> (Tensor, Tensor)", _route, _route_fake)


# --- rows ---
def _wide(dtype: torch.dtype) -> torch.dtype:
    """What rows are computed in, and the dtype of weights at the ops: float32, or float64 for float64 on the CPU."""
    return torch.promote_types(dtype, torch.float32)


def _sizes(place: Tensor, rows: Tensor) -> tuple[int, ...]:
    """Tokens, rows of each, width, and number of the dtype."""
    return *place.shape, rows.shape[1], native.dtype_number("experts", rows.dtype)


def _spread(x: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    out = _spread_fake(x, place, weights)
    if x.is_cuda:
        x, place, weights = x.contiguous(), place.contiguous(), None if weights is None else weights.contiguous()
        addresses = x.data_ptr(), native.address(weights), out.data_ptr(), place.data_ptr()
        native.call_cuda("experts_spread", x, *addresses, *_sizes(place, x))
        return out
    wide = x if weights is None else x.to(_wide(x.dtype))
    for k, places in enumerate(place.long().unbind(1)):
        out.index_copy_(0, places, x if weights is None else (wide * weights[:, k : k + 1]).to(x.dtype))
    return out


def _spread_fake(x: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    return x.new_empty((place.shape[0] * place.shape[1], x.shape[1]))


def _collect(y: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    if y.is_cuda:
        out = _collect_fake(y, place, weights)
        y, place, weights = y.contiguous(), place.contiguous(), None if weights is None else weights.contiguous()
        addresses = y.data_ptr(), native.address(weights), out.data_ptr(), place.data_ptr()
        native.call_cuda("experts_collect", y, *addresses, *_sizes(place, y))
        return out
    sums = y.new_zeros((place.shape[0], y.shape[1]), dtype=_wide(y.dtype))
    for k, places in enumerate(place.unbind(1)):
        rows = y.index_select(0, places)
        sums += rows if weights is None else rows * weights[:, k : k + 1]
    return sums.to(y.dtype)


def _collect_fake(y: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    return y.new_empty((place.shape[0], y.shape[1]))


def _dots(x: Tensor, y: Tensor, place: Tensor) -> Tensor:
    if x.is_cuda:
        dots = _dots_fake(x, y, place)
        x, y, place = x.contiguous(), y.contiguous(), place.contiguous()
        addresses = x.data_ptr(), y.data_ptr(), dots.data_ptr(), place.data_ptr()
        native.call_cuda("experts_dots", x, *addresses, *_sizes(place, x))
        return dots
    wide = x.to(_wide(x.dtype))
    return torch.stack([(wide * y.index_select(0, places)).sum(1) for places in place.unbind(1)], 1)


def _dots_fake(x: Tensor, y: Tensor, place: Tensor) -> Tensor:
    return x.new_empty(place.shape, dtype=_wide(x.dtype))


native.define("experts_spread(Tensor x, Tensor place, Tensor? weights) -> Tensor", _spread, _spread_fake)
native.define("experts_collect(Tensor y, Tensor place, Tensor? weights) -> Tensor", _collect, _collect_fake)
native.define("experts_dots(Tensor x, Tensor y, Tensor place) -> Tensor", _dots, _dots_fake)


class _Rows(torch.autograd.Function):
    """Rows of tokens spread to experts, or those of experts collected: each the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, weights: Tensor | None, collects: bool) -> Tensor:
        wide = None if weights is None else weights.to(_wide(rows.dtype))
        ctx.save_for_backward(place, wide, rows if ctx.needs_input_grad[2] else None)
        ctx.weights_dtype = None if weights is None else weights.dtype
        ctx.collects = collects
        return _moved(rows, place, wide, collects)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        place, weights, rows = ctx.saved_tensors
        drows = _moved(dout, place, weights, not ctx.collects) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[2]:
            return drows, None, None, None
        of_tokens, of_experts = (dout, rows) if ctx.collects else (rows, dout)
        dots = torch.ops.fastpeft.experts_dots(of_tokens, of_experts, place)
        return drows, None, dots.to(ctx.weights_dtype), None


def _moved(rows: Tensor, place: Tensor, weights: Tensor | None, collects: bool) -> Tensor:
    op = torch.ops.fastpeft.experts_collect if collects else torch.ops.fastpeft.experts_spread
    out: Tensor = op(rows, place, weights)
    return out


def _check(function: str, name: str, rows: Tensor, place: Tensor, weights: Tensor | None) -> None:
    if place.dim() != 2 or place.shape[1] == 0 or place.dtype != torch.int32:
        raise ValueError(
            f"{function}: place is {place.dtype} of shape {tuple(place.shape)}; it must be torch.int32, (t, top_k), as "
            "route gives it"
        )
    tokens, top_k = place.shape
    needed = tokens if name == "x" else tokens * top_k
    if rows.dim() != 2 or rows.shape[0] != needed or rows.shape[1] == 0:
        raise ValueError(f"{function}: {name} has shape {tuple(rows.shape)}; for this place it must be ({needed}, h)")
    native.dtype_number(function, rows.dtype)
    if weights is not None and (weights.shape != place.shape or not weights.is_floating_point()):
        raise ValueError(
            f"{function}: weights are {weights.dtype} of shape {tuple(weights.shape)}; they must be floating, "
            f"({tokens}, {top_k})"
        )
    if any(other is not None and other.device != rows.device for other in (place, weights)):
        raise ValueError(f"{function}: {name} is on {rows.device}; place and weights must be there too")


@torch.no_grad()
def route(ids: Tensor, experts: int) -> Routing:
    """Sort pairs of a token and an expert by expert: at ``place[t, k]`` stands token ``t`` for expert ``ids[t, k]``.

    Without gradient. On CUDA one launch, for up to 1024 experts, and a few of torch's for more; the host never waits.

    Args:
        ids: ``(t, top_k)``, int64, from 0 to ``experts`` - 1; ``t * top_k`` below 2^31. Pairs of any other id are
            given rows too, behind all experts', so that nothing that follows ``place`` leaves its bounds.
        experts: how many there are, at least 1.
    Returns:
        ``place``, ``(t, top_k)`` int32, in which each of 0 to ``t * top_k - 1`` stands once, and ``ends``,
        ``(experts,)`` int32: expert ``e`` has the rows from ``ends[e - 1]`` to ``ends[e]``. The sort is stable: an
        expert's rows are in the order of ``t``, then ``k``. Who multiplies row by row need not rely on that.
    Raises:
        ValueError: ids of another shape or dtype, too many, or no experts.
    """
    if ids.dim() != 2 or ids.shape[1] == 0 or ids.dtype != torch.int64:
        raise ValueError(
            f"route: ids is {ids.dtype} of shape {tuple(ids.shape)}; it must be torch.int64, (t, top_k), with at least "
            "one expert a token"
        )
    if experts < 1:
        raise ValueError(f"route: experts is {experts}; it must be at least 1")
    if ids.numel() >= 1 << 31:
        raise ValueError(f"route: {ids.shape[0]} x {ids.shape[1]} ids are too many for one call; split the tokens")
    return Routing(*torch.ops.fastpeft.experts_route(ids, experts))


def spread_rows(x: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """Copy each token's row to where its experts look for it: ``out[place[t, k]] = weights[t, k] * x[t]``.

    Differentiable in ``x`` and ``weights``. Products, and the sums over ``k`` in the gradient of ``x``, are float32
    and rounded once; sums are in the order of ``k``, so that equal calls give equal bits.

    Args:
        x: ``(t, h)``, float32, float16 or bfloat16; copied first where it is not contiguous.
        place: ``(t, top_k)`` int32, of ``route``: each of 0 to ``t * top_k - 1`` stands in it once. That is not
            checked; on CUDA a place that is not there is left out.
        weights: ``(t, top_k)``, of any floating dtype; without, ones.
    Returns:
        ``(t * top_k, h)``, dtype of ``x``.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    Source:
        Mixtures of experts, arXiv 1701.06538.
    """
    _check("spread_rows", "x", x, place, weights)
    out: Tensor = _Rows.apply(x, place, weights, False)  # type: ignore[no-untyped-call]
    return out


def collect_rows(y: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum what a token's experts made of it: ``out[t] = sum over k of weights[t, k] * y[place[t, k]]``.

    Differentiable in ``y`` and ``weights``. Sums are float32, in the order of ``k``, and rounded once. ``y`` is kept
    for backward only if the weights need a gradient.

    Args:
        y: ``(t * top_k, h)``, float32, float16 or bfloat16; copied first where it is not contiguous.
        place: as for ``spread_rows``.
        weights: as for ``spread_rows``.
    Returns:
        ``(t, h)``, dtype of ``y``.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    Source:
        Mixtures of experts, arXiv 1701.06538.
    """
    _check("collect_rows", "y", y, place, weights)
    out: Tensor = _Rows.apply(y, place, weights, True)  # type: ignore[no-untyped-call]
    return out
