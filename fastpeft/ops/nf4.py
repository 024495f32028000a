"""NF4 ops: quantise, dequantise, and products with a quantised weight.

On CUDA a product with up to 16 tokens is one kernel that reads the codes (`nf4_linear_plan` says when and why). Other
products dequantise the whole weight in one launch into a workspace of the framework's allocator and call the
framework's matmul; on the CPU they go by slabs of rows, small enough to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops.nf4_weight import BLOCK_SIZES, NESTED_BLOCK_SIZE, NF4Weight, Operands, dynamic_map

_SLAB_BYTES = 4 << 20
_WEIGHT = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, Tensor? offset, int block_size"


# --- quantise ---
def _quantize(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    w = w.contiguous()
    codes, absmax = _quantize_fake(w, block_size)
    dtype = native.dtype_number("nf4_quantize", w.dtype)
    native.call("nf4_quantize", w, w.data_ptr(), dtype, w.numel(), block_size, codes.data_ptr(), absmax.data_ptr())
    return codes, absmax


def _quantize_fake(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    codes = w.new_empty(((w.numel() + 1) // 2, 1), dtype=torch.uint8)
    return codes, w.new_empty((-(-w.numel() // block_size),), dtype=torch.float32)


def _quantize_scales(absmax: Tensor, offset: Tensor, nested_map: Tensor) -> tuple[Tensor, Tensor]:
    quantized, nested_absmax = _quantize_scales_fake(absmax, offset, nested_map)
    native.call(
        "nf4_quantize_scales",
        absmax,
        absmax.data_ptr(),
        offset.data_ptr(),
        nested_map.data_ptr(),
        absmax.numel(),
        quantized.data_ptr(),
        nested_absmax.data_ptr(),
    )
    return quantized, nested_absmax


def _quantize_scales_fake(absmax: Tensor, offset: Tensor, nested_map: Tensor) -> tuple[Tensor, Tensor]:
    blocks = absmax.shape[0]
    return absmax.new_empty((blocks,), dtype=torch.uint8), absmax.new_empty((-(-blocks // NESTED_BLOCK_SIZE),))


native.define("nf4_quantize(Tensor w, int block_size) -> (Tensor, Tensor)", _quantize, _quantize_fake)
native.define(
    "nf4_quantize_scales(Tensor absmax, Tensor offset, Tensor nested_map) -> (Tensor, Tensor)",
    _quantize_scales,
    _quantize_scales_fake,
)


def nf4_quantize(w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantise a tensor to 4-bit normal floats, to the bit as bitsandbytes 0.50.2 does on the same device.

    Args:
        w: any shape, float32, float16 or bfloat16, on the CPU or a CUDA device.
        block_size: elements a scale covers: a power of two from 32 to 4096, counted through the flattened tensor.
        double_quant: quantise the scales to 8 bits too; 0.516 bytes a weight instead of 0.563 (block size 64).
    Returns:
        The codes and scales, on the device of ``w``.
    Raises:
        ValueError: another block size, dtype or device.
    Source:
        QLoRA, arXiv 2305.14314, sections 3 and 4.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"nf4_quantize: block_size is {block_size}; it must be one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    if w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"nf4_quantize: w is {w.dtype}; it must be float32, float16 or bfloat16")
    w = w.detach()
    codes, absmax = torch.ops.fastpeft.nf4_quantize(w, block_size)
    nested_absmax = nested_map = offset = None
    if double_quant:
        # torch's own mean, because its summation order decides the last bit of the offset.
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        nested_map = dynamic_map(absmax.device)
        absmax, nested_absmax = torch.ops.fastpeft.nf4_quantize_scales(absmax, offset, nested_map)
    return NF4Weight(codes, absmax, nested_absmax, nested_map, offset, tuple(w.shape), block_size, w.dtype)


# --- dequantise ---
def _dequantize_range(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    numel: int,
    begin: int,
    end: int,
    out: Tensor,
) -> None:
    native.call(
        "nf4_dequantize",
        codes,
        codes.data_ptr(),
        absmax.data_ptr(),
        native.address(nested_absmax),
        native.address(nested_map),
        native.address(offset),
        numel,
        block_size,
        begin,
        end,
        out.data_ptr(),
        native.dtype_number("nf4_dequantize", out.dtype),
    )


def _dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = codes.new_empty(shape, dtype=dtype)
    operands = (codes, absmax, nested_absmax, nested_map, offset, block_size)
    _dequantize_range(*operands, out.numel(), 0, out.numel(), out)
    return out


def _dequantize_fake(codes: Tensor, *operands: Any) -> Tensor:
    shape, dtype = operands[-2:]
    return codes.new_empty(shape, dtype=dtype)


native.define(f"nf4_dequantize({_WEIGHT}, SymInt[] shape, ScalarType dtype) -> Tensor", _dequantize, _dequantize_fake)


def nf4_dequantize(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Decode an NF4 weight: level times scale in float32, one rounding to ``dtype``.

    Args:
        w: the quantised tensor.
        dtype: float32, float16 or bfloat16 (float64 on the CPU); the dtype it was quantised from when None.
    Returns:
        A new tensor of ``w.shape``, equal to the bit to bitsandbytes' ``dequantize_4bit``.
    Raises:
        ValueError: another dtype.
    """
    out: Tensor = torch.ops.fastpeft.nf4_dequantize(*w.operands, w.shape, dtype or w.dtype)
    return out


# --- products ---
def _row_slabs(operands: Operands, n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the decoded weight, slab by slab; a slab's first element begins a block."""
    block_size = operands[-1]
    step = block_size // gcd(block_size, k)
    if operands[0].is_cuda:
        rows = n
    else:
        rows = max(step, _SLAB_BYTES // (k * dtype.itemsize) // step * step)
    for begin in range(0, n, rows):
        end = min(n, begin + rows)
        slab = operands[0].new_empty((end - begin, k), dtype=dtype)
        _dequantize_range(*operands, n * k, begin * k, end * k, slab)
        yield slice(begin, end), slab


def _operands(values: list[Any]) -> Operands:
    codes, absmax, nested_absmax, nested_map, offset, block_size = values
    return codes, absmax, nested_absmax, nested_map, offset, block_size


def _plan(x2d: Tensor, codes: Tensor, block_size: int, n: int, k: int) -> tuple[bool, str]:
    aligned = x2d.data_ptr() % 16 == 0 and codes.data_ptr() % 16 == 0
    return native.nf4_linear_plan(x2d.shape[0], n, k, block_size, x2d.dtype, aligned, x2d.device)


def nf4_linear_plan(x: Tensor, w: NF4Weight) -> str:
    """Say in words how ``nf4_linear(x, w)`` is computed on this device, and why.

    Args:
        x: ``(..., k)``, as it would be given to ``nf4_linear``.
        w: an ``(n, k)`` weight.
    Returns:
        Such as ``decode: 1 x 8 tokens, 16 warps, 132 blocks`` or ``dequantise: k is 100, no multiple of 64``.
    """
    if not x.is_cuda:
        return "dequantise: on the CPU, by slabs of rows"
    return _plan(x.reshape(-1, w.k).contiguous(), w.codes, w.block_size, w.n, w.k)[1]


def _linear_from_codes(x2d: Tensor, operands: Operands, n: int, k: int, bias: Tensor | None) -> Tensor:
    codes, absmax, nested_absmax, nested_map, offset, block_size = operands
    y = x2d.new_empty((x2d.shape[0], n))
    native.call_cuda(
        "nf4_linear",
        x2d,
        x2d.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        native.address(nested_absmax),
        native.address(nested_map),
        native.address(offset),
        block_size,
        native.address(bias),
        y.data_ptr(),
        native.dtype_number("nf4_linear", x2d.dtype),
        x2d.shape[0],
        n,
        k,
    )
    return y


def _linear(x: Tensor, *rest: Any) -> Tensor:
    *operands, n, k, bias = rest
    x2d = x.reshape(-1, k)
    if x.is_cuda:
        x2d = x2d.contiguous()
        codes, block_size = operands[0], operands[-1]
        if _plan(x2d, codes, block_size, n, k)[0]:
            bias = None if bias is None else bias.contiguous()
            return _linear_from_codes(x2d, _operands(operands), n, k, bias).reshape(*x.shape[:-1], n)
    parts = [
        torch.nn.functional.linear(x2d, slab, None if bias is None else bias[rows])
        for rows, slab in _row_slabs(_operands(operands), n, k, x.dtype)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return y.reshape(*x.shape[:-1], n)


def _linear_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-3]))


def _linear_dx(dy: Tensor, *rest: Any) -> Tensor:
    *operands, n, k = rest
    dy2d = dy.reshape(-1, n)
    parts = (dy2d[:, rows] @ slab for rows, slab in _row_slabs(_operands(operands), n, k, dy.dtype))
    dx = next(parts)
    for index, part in enumerate(parts):
        if index == 0 and dy.dtype.itemsize == 2:
            dx = dx.float()  # summed in float32, rounded once
        dx += part
    return dx.to(dy.dtype).reshape(*dy.shape[:-1], k)


def _linear_dx_fake(dy: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], rest[-1]))


native.define(f"nf4_linear(Tensor x, {_WEIGHT}, SymInt n, SymInt k, Tensor? bias) -> Tensor", _linear, _linear_fake)
native.define(f"nf4_linear_dx(Tensor dy, {_WEIGHT}, SymInt n, SymInt k) -> Tensor", _linear_dx, _linear_dx_fake)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, n: int, k: int, *operands: Any) -> Tensor:
        ctx.save_for_backward(*operands[:-1])
        ctx.constants = (operands[-1], n, k)
        out: Tensor = torch.ops.fastpeft.nf4_linear(x, *operands, n, k, bias)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.fastpeft.nf4_linear_dx(dy, *ctx.saved_tensors, *ctx.constants)
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dbias, *(None,) * 8


def autocast(x: Tensor) -> Tensor:
    """Cast to autocast's dtype where autocast is on, as torch does for its own linear."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def check_linear(function: str, x: Tensor, n: int, k: int, device: torch.device, bias: Tensor | None) -> None:
    """Refuse shapes, dtypes and devices that do not fit; ValueError names ``function``."""
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{function}: x has shape {tuple(x.shape)}; its last size must be in_features, {k}")
    if not x.is_floating_point():
        raise ValueError(f"{function}: x is {x.dtype}; it must be float32, float16 or bfloat16")
    if x.device != device:
        raise ValueError(f"{function}: x is on {x.device} and the weight on {device}; move one of them")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"{function}: bias has shape {tuple(bias.shape)}; it must be ({n},)")


def nf4_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Multiply by an NF4 weight: ``x @ w.T + bias``, differentiable in ``x`` and ``bias``.

    Args:
        x: ``(..., k)``, float32, float16 or bfloat16; under autocast it is cast to autocast's dtype.
        w: packed codes of an ``(n, k)`` weight with its scales.
        bias: ``(n,)``; cast to the dtype of ``x``.
    Returns:
        ``(..., n)``, dtype of ``x``; accumulated in float32.
    Raises:
        ValueError: ``k`` differs from ``w.k``, or the tensors are on different devices.
    Source:
        QLoRA, arXiv 2305.14314, section 3.
    """
    if len(w.shape) != 2:
        raise ValueError(f"nf4_linear: the weight has shape {w.shape}; it must be (n, k)")
    check_linear("nf4_linear", x, w.n, w.k, w.device, bias)
    x = autocast(x)
    bias = None if bias is None else bias.to(x.dtype)
    out: Tensor = _NF4Linear.apply(x, bias, w.n, w.k, *w.operands)  # type: ignore[no-untyped-call]
    return out
