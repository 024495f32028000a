"""Gated activations, SwiGLU and GeGLU: one kernel forward, one backward that writes both gradients.

Kept for backward are the inputs alone. Gate and up may be two tensors or the halves of one, whose gradient is then
written as one tensor: chunking before the op would cost a copy to join the gradients again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native

# Numbers of fastpeft::GluKind (csrc/include/fastpeft/glu.h).
_SILU = 0
_GELU = {"tanh": 1, "none": 2}


def _halves(x: Tensor, up: Tensor | None) -> tuple[Any, ...]:
    """Address and row stride of gate and of up; without up, of the halves of x."""
    if up is not None:
        return x.data_ptr(), x.stride(0), up.data_ptr(), up.stride(0)
    middle = x.data_ptr() + x.shape[1] // 2 * x.element_size()
    return x.data_ptr(), x.stride(0), middle, x.stride(0)


def _width(gate: Tensor, up: Tensor | None) -> int:
    return gate.shape[-1] if up is not None else gate.shape[-1] // 2


def _glu(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    out = _glu_fake(gate, up, kind)
    gate_rows, up_rows = native.row_view(gate), None if up is None else native.row_view(up)
    width = _width(gate, up)
    number = native.dtype_number("glu", gate.dtype)
    halves = _halves(gate_rows, up_rows)
    native.call("glu", gate, gate_rows.shape[0], width, number, kind, *halves, out.data_ptr(), width)
    return out


def _glu_fake(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], _width(gate, up)))


def _glu_backward(dy: Tensor, gate: Tensor, up: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    dgate, dup = _glu_backward_fake(dy, gate, up, kind)
    _write_gradients(dy, gate, up, dgate, dup, kind)
    return dgate, dup


def _glu_backward_(dy: Tensor, gate: Tensor, up: Tensor | None, kind: int) -> None:
    _write_gradients(dy, gate, up, gate, gate if up is None else up, kind)


def _write_gradients(dy: Tensor, gate: Tensor, up: Tensor | None, dgate: Tensor, dup: Tensor, kind: int) -> None:
    """The kernels read an element's inputs before they write its gradients, so that both may be the same memory."""
    dy_rows, gate_rows, up_rows = (
        native.row_view(dy),
        native.row_view(gate),
        None if up is None else native.row_view(up),
    )
    grads = _halves(dgate.view(gate_rows.shape), None if up_rows is None else dup.view(up_rows.shape))
    native.call(
        "glu_backward",
        gate,
        gate_rows.shape[0],
        _width(gate, up),
        native.dtype_number("glu", gate.dtype),
        kind,
        dy_rows.data_ptr(),
        dy_rows.stride(0),
        *_halves(gate_rows, up_rows),
        *grads,
    )


def _glu_backward_fake(dy: Tensor, gate: Tensor, up: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty((0,) if up is None else up.shape)


native.define("glu(Tensor gate, Tensor? up, int kind) -> Tensor", _glu, _glu_fake)
native.define(
    "glu_backward(Tensor dy, Tensor gate, Tensor? up, int kind) -> (Tensor, Tensor)", _glu_backward, _glu_backward_fake
)


native.define(
    "glu_backward_(Tensor dy, Tensor(a!) gate, Tensor(b!)? up, int kind) -> ()",
    _glu_backward_,
    lambda dy, gate, up, kind: None,
)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        out: Tensor = torch.ops.fastpeft.glu(gate, up, kind)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.ops.fastpeft.glu_backward(dy, gate, up, ctx.kind)
        return dgate, None if up is None else dup, None


class _GluInPlace(_Glu):
    """Writes the gradients over gate and up, which nobody reads afterwards."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = (None if saved is None else saved.detach() for saved in ctx.saved_tensors)
        torch.ops.fastpeft.glu_backward_(dy, gate, up, ctx.kind)
        return gate, up, None


def glu_consuming(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """`swiglu` or `geglu` whose backward writes the gradients into the memory of its inputs.

    Args:
        gate: as for ``swiglu``; contiguous, recomputed for this one backward.
        up: likewise.
        activation: ``silu``, ``gelu_tanh`` or ``gelu``.
    Returns:
        As ``swiglu``.
    """
    kind = {"silu": _SILU, "gelu_tanh": _GELU["tanh"], "gelu": _GELU["none"]}[activation]
    if not gate.is_contiguous() or (up is not None and not up.is_contiguous()):
        return _apply("glu_consuming", gate, up, kind)
    out: Tensor = _GluInPlace.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    return out


def _apply(function: str, gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    if up is None and (gate.dim() == 0 or gate.shape[-1] % 2):
        raise ValueError(
            f"{function}: gate has shape {tuple(gate.shape)}; without up, its last size must be even, as it holds both"
        )
    if gate.dim() == 0 or gate.shape[-1] == 0:
        raise ValueError(f"{function}: gate has shape {tuple(gate.shape)}; it must be (..., width)")
    if up is not None and (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(
            f"{function}: gate is {tuple(gate.shape)}, {gate.dtype} on {gate.device} and up {tuple(up.shape)}, "
            f"{up.dtype} on {up.device}; they must be alike"
        )
    out: Tensor = _Glu.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    return out


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Multiply by a gate through SiLU: ``silu(gate) * up``.

    Differentiable in both. Computed in float32 and rounded once; transformers rounds ``silu(gate)`` before the product.

    Args:
        gate: ``(..., width)``, float32, float16 or bfloat16; rows may lie apart in memory. Without ``up``,
            ``(..., 2 * width)``: gate, then up; the gradient comes as one tensor too.
        up: shape and dtype of ``gate``.
    Returns:
        ``(..., width)``, dtype of ``gate``, contiguous.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    Source:
        GLU variants improve transformer, arXiv 2002.05202.
    """
    return _apply("swiglu", gate, up, _SILU)


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """Multiply by a gate through GELU: ``gelu(gate) * up``.

    Differentiable in both. Computed in float32 and rounded once; transformers rounds ``gelu(gate)`` before the product.

    Args:
        gate: as for ``swiglu``.
        up: as for ``swiglu``.
        approximate: ``tanh`` for the approximation by a hyperbolic tangent, ``none`` for the error function.
    Returns:
        ``(..., width)``, dtype of ``gate``, contiguous.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or another ``approximate``.
    Source:
        GLU variants improve transformer, arXiv 2002.05202; Gaussian error linear units, arXiv 1606.08415.
    """
    if approximate not in _GELU:
        raise ValueError(f"geglu: approximate is {approximate!r}; it must be 'tanh' or 'none'")
    return _apply("geglu", gate, up, _GELU[approximate])
