"""RMSNorm, with the residual add before it, forward and backward in one kernel each.

Kept for backward are the tensor that was normalised and a float32 factor a row; the weight's gradient is summed only
when it is wanted, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native


def _shape(x: Tensor, weight: Tensor, offset: float, cast_first: bool) -> tuple[Any, ...]:
    """What both native calls begin with, from the rows of x."""
    x_number = native.dtype_number("rms_norm", x.dtype)
    weight_number = native.dtype_number("rms_norm", weight.dtype)
    return (*x.shape, x_number, weight_number, offset, cast_first)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, rstd = _forward_fake(x, weight, residual)
    rows, weight = native.row_view(x), weight.contiguous()
    residual_rows = None if residual is None else native.row_view(residual)
    native.call(
        "rms_norm",
        x,
        *_shape(rows, weight, offset, cast_first),
        rows.data_ptr(),
        rows.stride(0),
        native.address(residual_rows),
        0 if residual_rows is None else residual_rows.stride(0),
        weight.data_ptr(),
        eps,
        y.data_ptr(),
        h.data_ptr(),
        rstd.data_ptr(),
    )
    return y, h, rstd


def _forward_fake(x: Tensor, weight: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty((0,) if residual is None else x.shape)
    return x.new_empty(x.shape), h, x.new_empty((x.numel() // x.shape[-1],), dtype=_sum_dtype(x))


def _backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float,
    cast_first: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dx, dweight = _backward_fake(dy, dh, h, rstd, weight, offset, cast_first, want_dweight)
    dy_rows, h_rows, weight = native.row_view(dy), native.row_view(h), weight.contiguous()
    dh_rows = None if dh is None else native.row_view(dh)
    partials = None
    if want_dweight:
        rows, width = h_rows.shape
        partials = rstd.new_empty((native.rms_norm_partial_rows(rows, width, h.dtype, h.device), width))
    native.call(
        "rms_norm_backward",
        dy,
        *_shape(h_rows, weight, offset, cast_first),
        dy_rows.data_ptr(),
        dy_rows.stride(0),
        native.address(dh_rows),
        0 if dh_rows is None else dh_rows.stride(0),
        h_rows.data_ptr(),
        h_rows.stride(0),
        rstd.data_ptr(),
        weight.data_ptr(),
        dx.data_ptr(),
        dweight.data_ptr() if want_dweight else 0,
        native.address(partials),
        0 if partials is None else partials.shape[0],
    )
    return dx, dweight


def _backward_fake(dy: Tensor, dh: Tensor | None, h: Tensor, rstd: Tensor, weight: Tensor, *rest: Any) -> Any:
    want_dweight = rest[-1]
    return dy.new_empty(h.shape), weight.new_empty(weight.shape if want_dweight else (0,))


native.define(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps, float offset, bool cast_first) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
native.define(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor rstd, Tensor weight, float offset, bool cast_first, "
    "bool want_dweight) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, cast_first: bool
    ) -> Any:
        y, h, rstd = torch.ops.fastpeft.rms_norm(x, weight, residual, eps, offset, cast_first)
        ctx.save_for_backward(x if residual is None else h, rstd, weight)
        ctx.constants = (offset, cast_first)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dy is None:  # only h was used
            return dh, None, dh, None, None, None
        h, rstd, weight = ctx.saved_tensors
        want_dweight = ctx.needs_input_grad[1]
        dx, dweight = torch.ops.fastpeft.rms_norm_backward(dy, dh, h, rstd, weight, *ctx.constants, want_dweight)
        dresidual = dx if ctx.needs_input_grad[2] else None
        return dx, dweight if want_dweight else None, dresidual, None, None, None


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast_first: bool = True,
    residual: Tensor | None = None,
) -> Any:
    """Scale rows to a root mean square of one, then by a weight; with a residual, add it first.

    Differentiable in ``x``, ``residual`` and ``weight``.

    Args:
        x: ``(..., width)``, float32, float16 or bfloat16; rows may lie apart in memory.
        weight: ``(width,)``; of another dtype than that of ``x`` and float32, it is cast to that of ``x``.
        eps: added to the mean square.
        offset: added to the weight in float32: 1.0 for Gemma, whose weights are stored around zero.
        cast_first: round the scaled rows to the dtype of ``x`` before they meet the weight, as Llama does; otherwise
            there is one rounding, at the end, as in Gemma.
        residual: shape and dtype of ``x``.
    Returns:
        ``y``, shape and dtype of ``x``, contiguous; with a residual the pair ``(y, h)`` with ``h = x + residual`` in
        their dtype, of which ``y`` is the norm. Sums are float32.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    Source:
        Root mean square layer normalization, arXiv 1910.07467.
    """
    if x.dim() == 0 or x.shape[-1] == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: x has shape {tuple(x.shape)} and the weight {tuple(weight.shape)}; "
            "they must be (..., width) and (width,), with a width of at least 1"
        )
    if weight.device != x.device:
        raise ValueError(f"rms_norm: x is on {x.device} and the weight on {weight.device}; move one of them")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"rms_norm: x is {tuple(x.shape)}, {x.dtype} on {x.device} and the residual {tuple(residual.shape)}, "
            f"{residual.dtype} on {residual.device}; they must be alike"
        )
    if weight.dtype not in (x.dtype, torch.float32):
        weight = weight.to(x.dtype)
    return _RmsNorm.apply(x, weight, residual, eps, offset, cast_first)  # type: ignore[no-untyped-call]
