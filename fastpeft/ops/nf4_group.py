"""Products of one input with several NF4 weights: for few tokens one launch on CUDA, as decoding wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastpeft.ops import native
from fastpeft.ops.nf4 import autocast, check_linear, nf4_linear
from fastpeft.ops.nf4_weight import NF4Weight, dynamic_map

MOST_WEIGHTS = 3
MOST_TOKENS = 64  # of a product in one launch
_BLOCK_SIZE = 64
_is_dynamic_map = WeakTensorKeyDictionary()


def _plan(x2d: Tensor, codes: Sequence[Tensor], absmax: Sequence[Tensor], n: Sequence[int]) -> native.GroupPlan | None:
    """What one launch needs; None where there is none for these sizes and addresses."""
    if any(tensor.data_ptr() % 16 for tensor in (x2d, *codes, *absmax)):
        return None
    plan = native.nf4_linear_group_plan(x2d.shape[0], tuple(n), x2d.shape[1], x2d.dtype, x2d.device)
    return plan if plan.together else None


def _group(
    x: Tensor,
    codes: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor],
    nested_map: list[Tensor],
    offset: list[Tensor],
    n: list[int],
    k: int,
) -> Tensor:
    weights = list(zip(codes, absmax, nested_absmax, nested_map, offset, strict=True))
    x2d = x.reshape(-1, k)
    plan = None
    if x.is_cuda:
        x2d = x2d.contiguous()
        plan = _plan(x2d, codes, absmax, n)
    if plan is None:
        parts = [
            torch.ops.fastpeft.nf4_linear(x, *weight, _BLOCK_SIZE, size, k, None)
            for weight, size in zip(weights, n, strict=True)
        ]
        return torch.cat(parts, -1)
    y = x2d.new_empty((x2d.shape[0], sum(n)))
    workspace = x2d.new_empty((plan.workspace_bytes,), dtype=torch.uint8) if plan.workspace_bytes else None
    counters = native.counters(plan.counters, x2d.device) if plan.counters else None
    native.call_cuda(
        "nf4_linear_group",
        x2d,
        x2d.data_ptr(),
        [tuple(tensor.data_ptr() for tensor in weight) for weight in weights],
        n,
        y.data_ptr(),
        native.dtype_number("nf4_linear_group", x2d.dtype),
        x2d.shape[0],
        k,
        native.address(workspace),
        plan.workspace_bytes,
        native.address(counters),
    )
    return y.view(*x.shape[:-1], sum(n))


native.define(
    "nf4_linear_group(Tensor x, Tensor[] codes, Tensor[] absmax, Tensor[] nested_absmax, Tensor[] nested_map, "
    "Tensor[] offset, SymInt[] n, SymInt k) -> Tensor",
    _group,
    lambda x, *rest: x.new_empty((*x.shape[:-1], sum(rest[-2]))),
)


def _has_dynamic_map(w: NF4Weight) -> bool:
    """Whether a weight has the map that the format prescribes; one launch knows but one. Compared once a tensor."""
    if w.nested_map is None:
        return False
    known = _is_dynamic_map.get(w.nested_map)
    if known is None:
        if torch.cuda.is_current_stream_capturing():
            return False  # comparing waits for the device
        known = bool(torch.equal(w.nested_map, dynamic_map(w.device)))
        _is_dynamic_map[w.nested_map] = known
    return bool(known)


def nf4_linear_group(x: Tensor, weights: Sequence[NF4Weight]) -> list[Tensor]:
    """Multiply one input by several NF4 weights: ``x @ w.T`` for each.

    Up to 64 tokens and three weights are one launch on CUDA where nothing is to be differentiated; whatever is not of
    that form is multiplied one by one.

    Args:
        x: ``(..., k)``, float32, float16 or bfloat16; under autocast it is cast to autocast's dtype.
        weights: of ``(n_i, k)``, at least one.
    Returns:
        For each ``(..., n_i)``, dtype of ``x``, accumulated in float32; as views of one tensor they are not contiguous.
    Raises:
        ValueError: ``k`` differs between ``x`` and a weight, or the tensors are on different devices.
    """
    for w in weights:
        check_linear("nf4_linear_group", x, w.n, w.k, w.device, None)
    x = autocast(x)
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    if (
        not x.is_cuda
        or wants_gradient
        or not 1 < len(weights) <= MOST_WEIGHTS
        or x.numel() > MOST_TOKENS * x.shape[-1]
        or not all(w.block_size == _BLOCK_SIZE and _has_dynamic_map(w) for w in weights)
    ):
        return [nf4_linear(x, w) for w in weights]
    columns: Any = zip(*(w.operands[:-1] for w in weights), strict=True)
    sizes = [w.n for w in weights]
    y: Tensor = torch.ops.fastpeft.nf4_linear_group(x, *map(list, columns), sizes, x.shape[-1])
    return list(y.split(sizes, -1))
