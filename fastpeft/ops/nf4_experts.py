"""Products of rows that are sorted by expert, each expert with an NF4 weight of its own, as in a mixture of experts.

The weights are one ``(experts, n, k)`` tensor, quantised as one. On Hopper a launch takes all experts, forward or
backward, straight from the codes; the host need not know how many rows each has, so that it can be captured. Elsewhere
one expert's weight is decoded at a time and multiplied by the framework, which waits for the device to learn the
numbers of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops.nf4 import WEIGHT, autocast, by_slabs, check_linear, dx_by_slabs, operands_of, row_slabs
from fastpeft.ops.nf4_weight import NF4Weight, Operands


def _experts(x: Tensor, ends: Tensor, *rest: Any) -> Tensor:
    *operands, n, k, transposed = rest
    x = x.contiguous()
    if x.is_cuda:
        if x.data_ptr() % 16:
            x = x.clone()
        plan = _plan(x, operands_of(operands), ends.shape[0], n, k, transposed)
        if plan.fused:
            return _together(x, ends.contiguous(), operands_of(operands), n, k, transposed, plan.workspace_bytes)
    return _one_by_one(x, ends, operands_of(operands), n, k, transposed)


def _plan(x: Tensor, operands: Operands, experts: int, n: int, k: int, transposed: bool) -> native.ExpertsPlan:
    aligned = x.data_ptr() % 16 == 0 and operands[0].data_ptr() % 16 == 0
    rows, block_size = x.shape[0], operands[-1]
    return native.nf4_experts_plan(rows, experts, n, k, transposed, block_size, x.dtype, aligned, x.device)


def _together(
    x: Tensor, ends: Tensor, operands: Operands, n: int, k: int, transposed: bool, workspace_bytes: int
) -> Tensor:
    codes, absmax, nested_absmax, nested_map, offset, block_size = operands
    y = _experts_fake(x, ends, n, k, transposed)
    workspace = x.new_empty((workspace_bytes,), dtype=torch.uint8)
    native.call_cuda(
        "nf4_linear_experts",
        x,
        transposed,
        x.data_ptr(),
        ends.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        native.address(nested_absmax),
        native.address(nested_map),
        native.address(offset),
        block_size,
        y.data_ptr(),
        native.dtype_number("nf4_linear_experts", x.dtype),
        x.shape[0],
        ends.shape[0],
        n,
        k,
        workspace.data_ptr(),
        workspace_bytes,
    )
    return y


def _one_by_one(x: Tensor, ends: Tensor, operands: Operands, n: int, k: int, transposed: bool) -> Tensor:
    y, experts, begin = _experts_fake(x, ends, n, k, transposed), ends.shape[0], 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            slabs = row_slabs(operands, n, k, x.dtype, expert * n, (experts - 1 - expert) * n)
            (dx_by_slabs if transposed else by_slabs)(x[begin:end], slabs, y[begin:end])
        begin = end
    return y


def _experts_fake(x: Tensor, ends: Tensor, *rest: Any) -> Tensor:
    n, k, transposed = rest[-3:]
    return x.new_empty((x.shape[0], k if transposed else n))


native.define(
    f"nf4_linear_experts(Tensor x, Tensor ends, {WEIGHT}, SymInt n, SymInt k, bool transposed) -> Tensor",
    _experts,
    _experts_fake,
)


class _NF4LinearExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, n: int, k: int, *operands: Any) -> Tensor:
        ctx.save_for_backward(ends, *operands[:-1])
        ctx.constants = (operands[-1], n, k)
        y: Tensor = torch.ops.fastpeft.nf4_linear_experts(x, ends, *operands, n, k, False)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = torch.ops.fastpeft.nf4_linear_experts(dy, *ctx.saved_tensors, *ctx.constants, True)
        return dx, *(None,) * 9


def nf4_linear_experts_plan(x: Tensor, w: NF4Weight, transposed: bool = False) -> str:
    """Say in words how ``nf4_linear_experts(x, w, ends)`` or its backward is computed on this device, and why.

    Args:
        x: ``(rows, k)``, as it would be given to ``nf4_linear_experts``; ``(rows, n)`` if ``transposed``.
        w: of ``(experts, n, k)``.
        transposed: ask for the gradient by the input.
    Returns:
        Such as ``tiles: 128 x 64, clusters of 1`` or ``one by one: x is not of a 16-bit type``.
    """
    if not x.is_cuda:
        return "one by one: on the CPU"
    experts, n, k = w.shape
    return _plan(x, w.operands, experts, n, k, transposed).reason


def nf4_linear_experts(x: Tensor, w: NF4Weight, ends: Tensor) -> Tensor:
    """Multiply each row by the weight of its expert: ``y[i] = x[i] @ w[e].T``, differentiable in ``x``.

    Args:
        x: ``(rows, k)``, sorted by expert; float32, float16 or bfloat16; under autocast it is cast to its dtype.
        w: of ``(experts, n, k)``; ``n * k`` a multiple of its block size.
        ends: ``(experts,)``, int32: where each expert's rows end, ascending, the last at ``rows``.
    Returns:
        ``(rows, n)``, dtype of ``x``; accumulated in float32.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    Source:
        QLoRA, arXiv 2305.14314, section 3.
    """
    if len(w.shape) != 3:
        raise ValueError(f"nf4_linear_experts: the weight has shape {w.shape}; it must be (experts, n, k)")
    experts, n, k = w.shape
    if n * k % w.block_size:
        raise ValueError(
            f"nf4_linear_experts: n * k is {n * k}; it must be a multiple of the block size, {w.block_size}"
        )
    if x.dim() != 2:
        raise ValueError(f"nf4_linear_experts: x has shape {tuple(x.shape)}; it must be (rows, {k})")
    check_linear("nf4_linear_experts", x, n, k, w.device, None)
    if tuple(ends.shape) != (experts,) or ends.dtype != torch.int32 or ends.device != w.device:
        raise ValueError(
            f"nf4_linear_experts: ends is {tuple(ends.shape)} of {ends.dtype} on {ends.device}; it must be "
            f"({experts},) of torch.int32 on {w.device}"
        )
    x = autocast(x)
    y: Tensor = _NF4LinearExperts.apply(x, ends, n, k, *w.operands)  # type: ignore[no-untyped-call]
    return y
