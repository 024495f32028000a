"""The low-rank terms of LoRA linears for few tokens, where nothing is differentiated: a decoding step's two launches
beside the base products, whatever the base (csrc/include/fastpeft/lora_few.h).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops.nf4 import base_product, nf4_linear_add_
from fastpeft.ops.nf4_group import nf4_linear_group
from fastpeft.ops.nf4_weight import NF4Weight


def takes(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether the kernels take a call.

    Args:
        x: ``(..., k)``.
        a: ``(r, k)`` of each adapter.
        b: ``(n, r)`` of each.
        biases: of each, or none at all.
    """
    if torch.compiler.is_compiling() or not x.is_cuda:  # a compiler knows no addresses
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *a, *b, *biases)):
        return False
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in (*a, *b)) or any(t.data_ptr() % 16 for t in a):
        return False
    return _floats(x.numel() // max(1, x.shape[-1]), x, a) > 0


def _floats(m: int, x: Tensor, a: Sequence[Tensor]) -> int:
    """Words of sums; 0 where the kernels do not take the sizes."""
    architecture = native.device_limits(x.device)[0]
    return native.lora_few_floats(m, x.shape[-1], tuple(down.shape[0] for down in a), x.dtype, architecture)


def few(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """Apply LoRA linears that share an input, where `takes` says so; arguments as for ``lora_linear_group``."""
    sums = _project(x, a, b)
    packed = [w for w in weights if isinstance(w, NF4Weight)]
    if len(packed) == len(weights) and all(bias is None for bias in biases):
        ys = nf4_linear_group(x, packed)
    else:
        ys = [base_product(x, w, bias) for w, bias in zip(weights, biases, strict=True)]
    torch.ops.fastpeft.lora_few_add_(ys, sums, a, b, scales)
    return ys


def few_add_(y: Tensor, x: Tensor, w: NF4Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Add a LoRA linear over an NF4 base to ``y``, where `takes` says so; in place."""
    sums = _project(x, [a], [b])
    nf4_linear_add_(y, x, w)
    torch.ops.fastpeft.lora_few_add_([y], sums, [a], [b], [scale])
    return y


def _project(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    x2d = x.reshape(-1, x.shape[-1]).contiguous()
    if x2d.data_ptr() % 16:
        x2d = x2d.clone()
    sums: Tensor = torch.ops.fastpeft.lora_few_project(x2d, list(a), list(b))
    return sums


# --- ops ---
def _adapters(a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]) -> list[object]:
    return [native.lora_adapter(down, up, scale) for down, up, scale in zip(a, b, scales, strict=True)]


def _project_op(x2d: Tensor, a: list[Tensor], b: list[Tensor]) -> Tensor:
    sums = _project_fake(x2d, a, b)
    m, k = x2d.shape
    dtype = native.dtype_number("lora_few_project", x2d.dtype)
    adapters = _adapters(a, b, [1.0] * len(a))  # scales are of the sum
    native.call_cuda("lora_few_project", x2d, x2d.data_ptr(), dtype, m, k, adapters, sums.data_ptr())
    return sums


def _project_fake(x2d: Tensor, a: list[Tensor], b: list[Tensor]) -> Tensor:
    return x2d.new_empty((_floats(x2d.shape[0], x2d, a),), dtype=torch.float32)


def _add_op(ys: list[Tensor], sums: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float]) -> None:
    rows = [native.row_view(y) for y in ys]
    native.call_cuda(
        "lora_few_add",
        sums,
        native.dtype_number("lora_few_add", ys[0].dtype),
        rows[0].shape[0],
        a[0].shape[1],
        _adapters(a, b, scales),
        sums.data_ptr(),
        [y.data_ptr() for y in rows],
        [y.stride(0) for y in rows],
    )


native.define("lora_few_project(Tensor x2d, Tensor[] a, Tensor[] b) -> Tensor", _project_op, _project_fake)
native.define(
    "lora_few_add_(Tensor(a!)[] ys, Tensor sums, Tensor[] a, Tensor[] b, float[] scales) -> ()",
    _add_op,
    lambda *_: None,
)
