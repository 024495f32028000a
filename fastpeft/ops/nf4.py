"""NF4 ops: quantise, dequantise, and products with a quantised weight.

On CUDA a product in a 16-bit type, forward or backward, is one kernel that reads the codes; `nf4_linear_plan` says
which, and why. Other products dequantise slabs of rows into a workspace of the framework's allocator and call the
framework's matmul: on CUDA slabs of at most 32 MB, on the CPU small enough to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops.nf4_weight import BLOCK_SIZES, NESTED_BLOCK_SIZE, NF4Weight, Operands, dynamic_map

_SLAB_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
WEIGHT = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, Tensor? offset, int block_size"


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


native.define(f"nf4_dequantize({WEIGHT}, SymInt[] shape, ScalarType dtype) -> Tensor", _dequantize, _dequantize_fake)


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
def row_slabs(
    operands: Operands, n: int, k: int, dtype: torch.dtype, before: int = 0, after: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the decoded weight, slab by slab in one buffer; a slab's first element begins a block.

    Args:
        operands: of a weight of ``before + n + after`` rows.
        n: rows to decode.
        k: columns.
        dtype: of the slabs.
        before: rows that are passed over; ``before * k`` is a multiple of the block size.
        after: rows behind.
    Yields:
        Which of the n rows, and their values.
    """
    block_size = operands[-1]
    step = block_size // gcd(block_size, k)
    rows = max(step, _SLAB_BYTES[operands[0].device.type] // max(1, k * dtype.itemsize) // step * step)
    buffer = operands[0].new_empty((min(n, rows), k), dtype=dtype)
    for begin in range(0, n, rows):
        end = min(n, begin + rows)
        slab = buffer[: end - begin]
        _dequantize_range(*operands, (before + n + after) * k, (before + begin) * k, (before + end) * k, slab)
        yield slice(begin, end), slab


def by_slabs(x2d: Tensor, slabs: Iterator[tuple[slice, Tensor]], out: Tensor, bias: Tensor | None = None) -> None:
    """Write ``x2d @ w.T + bias`` into ``out``, w given by ``row_slabs``."""
    for rows, slab in slabs:
        if bias is None:
            torch.mm(x2d, slab.t(), out=out[:, rows])
        else:
            torch.addmm(bias[rows], x2d, slab.t(), out=out[:, rows])


def dx_by_slabs(dy2d: Tensor, slabs: Iterator[tuple[slice, Tensor]], out: Tensor) -> None:
    """Write ``dy2d @ w`` into ``out``, w given by ``row_slabs``."""
    begun, total = False, None
    for rows, slab in slabs:
        part = dy2d[:, rows]
        if not begun:
            begun = True
            torch.mm(part, slab, out=out)
        elif slab.dtype.itemsize == 2:  # summed in float32, rounded once
            total = (out.float() if total is None else total).add_(part @ slab)
        else:
            out.addmm_(part, slab)
    if not begun:
        out.zero_()
    elif total is not None:
        out.copy_(total)


def operands_of(values: list[Any]) -> Operands:
    """Operands of one weight from the arguments of an op."""
    codes, absmax, nested_absmax, nested_map, offset, block_size = values
    return codes, absmax, nested_absmax, nested_map, offset, block_size


def _plan(x2d: Tensor, codes: Tensor, block_size: int, n: int, k: int, transposed: bool) -> native.LinearPlan:
    aligned = x2d.data_ptr() % 16 == 0 and codes.data_ptr() % 16 == 0
    return native.nf4_linear_plan(x2d.shape[0], n, k, transposed, block_size, x2d.dtype, aligned, x2d.device)


def nf4_linear_plan(x: Tensor, w: NF4Weight, transposed: bool = False) -> str:
    """Say in words how ``nf4_linear(x, w)`` or its backward is computed on this device, and why.

    Args:
        x: ``(..., k)``, as it would be given to ``nf4_linear``; ``(..., n)`` if ``transposed``.
        w: an ``(n, k)`` weight.
        transposed: ask for ``x @ w``, the gradient by the input, instead of ``x @ w.T``.
    Returns:
        Such as ``decode: 1 x 8 tokens, 16 warps, 132 blocks`` or ``mma: k is 100, no multiple of 64``.
    """
    if not x.is_cuda:
        return "dequantise: on the CPU, by slabs of rows"
    x2d = x.reshape(-1, w.n if transposed else w.k).contiguous()
    return _plan(x2d, w.codes, w.block_size, w.n, w.k, transposed).reason


def _from_codes(
    x2d: Tensor,
    operands: Operands,
    n: int,
    k: int,
    transposed: bool,
    bias: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor | None:
    """The product by a kernel that reads the codes; None where none does, or none that adds."""
    plan = _plan(x2d, operands[0], operands[-1], n, k, transposed)
    if plan.kernel == "dequantise" or (add_to is not None and not (plan.can_add and _is_usual(operands, add_to))):
        return None
    y = x2d.new_empty((x2d.shape[0], k if transposed else n)) if add_to is None else add_to
    workspace = x2d.new_empty((plan.workspace_bytes,), dtype=torch.uint8) if plan.workspace_bytes else None
    counters = native.counters(plan.counters, x2d.device) if plan.counters else None
    product_from_codes(
        x2d,
        operands,
        n,
        k,
        transposed,
        bias,
        y,
        native.address(workspace),
        plan.workspace_bytes,
        counters,
        add=add_to is not None,
    )
    return y


def _is_usual(operands: Operands, y: Tensor) -> bool:
    """Whether addresses and scales are such that a kernel which can add does."""
    _, absmax, nested_absmax, _, _, block_size = operands
    aligned = absmax.data_ptr() % 16 == 0 and y.data_ptr() % 16 == 0
    return nested_absmax is not None and block_size == 64 and aligned


def product_from_codes(
    x2d: Tensor,
    operands: Operands,
    n: int,
    k: int,
    transposed: bool,
    bias: Tensor | None,
    y: Tensor,
    workspace: int,
    workspace_bytes: int,
    counters: Tensor | None,
    adapter: object | None = None,
    add: bool = False,
) -> None:
    """Run the kernel that the plan has chosen.

    Args:
        x2d: contiguous ``(m, k)``, or ``(m, n)`` if transposed.
        operands: of the ``(n, k)`` weight.
        n: out_features.
        k: in_features.
        transposed: multiply by the weight instead of its transpose.
        bias: contiguous ``(n,)`` or None.
        y: ``(m, n)``, or ``(m, k)`` if transposed.
        workspace: address of as many bytes as the plan asks for.
        workspace_bytes: how many.
        counters: as many as the plan asks for.
        adapter: ``native.linear_adapter`` of what joins the product.
        add: to what ``y`` holds; only where the plan can.
    """
    codes, absmax, nested_absmax, nested_map, offset, block_size = operands
    native.call_cuda(
        "nf4_linear",
        x2d,
        transposed,
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
        workspace,
        workspace_bytes,
        native.address(counters),
        native.device_limits(x2d.device)[-1],
        add,
        adapter,
    )


def shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """Give an op's fresh result its shape, not as a view: autograd forbids to change a view that an op made in place.

    Args:
        y: made by the op, and used by nobody else.
        shape: of as many elements.
    """
    out: Tensor = torch.ops.aten._unsafe_view(y, shape)
    return out


def _linear(x: Tensor, *rest: Any) -> Tensor:
    *operands, n, k, bias = rest
    x2d = x.reshape(-1, k)
    if x.is_cuda:
        x2d = x2d.contiguous()
        bias = None if bias is None else bias.contiguous()
        y = _from_codes(x2d, operands_of(operands), n, k, False, bias)
        if y is not None:
            return shaped(y, (*x.shape[:-1], n))
    out = x2d.new_empty((x2d.shape[0], n))
    by_slabs(x2d, row_slabs(operands_of(operands), n, k, x.dtype), out, bias)
    return shaped(out, (*x.shape[:-1], n))


def _linear_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-3]))


def _linear_dx(dy: Tensor, *rest: Any) -> Tensor:
    *operands, n, k = rest
    dy2d = dy.reshape(-1, n)
    if dy.is_cuda:
        dy2d = dy2d.contiguous()
        dx = _from_codes(dy2d, operands_of(operands), n, k, True)
        if dx is not None:
            return dx.reshape(*dy.shape[:-1], k)
    dx = dy2d.new_empty((dy2d.shape[0], k))
    dx_by_slabs(dy2d, row_slabs(operands_of(operands), n, k, dy.dtype), dx)
    return dx.reshape(*dy.shape[:-1], k)


def _linear_dx_fake(dy: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], rest[-1]))


native.define(f"nf4_linear(Tensor x, {WEIGHT}, SymInt n, SymInt k, Tensor? bias) -> Tensor", _linear, _linear_fake)


def _linear_add(y: Tensor, x: Tensor, *rest: Any) -> None:
    *operands, n, k = rest
    added = None
    if x.is_cuda and y.is_contiguous():
        added = _from_codes(x.reshape(-1, k).contiguous(), operands_of(operands), n, k, False, add_to=y)
    if added is None:
        y.add_(_linear(x, *rest, None))


native.define(f"nf4_linear_dx(Tensor dy, {WEIGHT}, SymInt n, SymInt k) -> Tensor", _linear_dx, _linear_dx_fake)

native.define(
    f"nf4_linear_add_(Tensor(a!) y, Tensor x, {WEIGHT}, SymInt n, SymInt k) -> ()", _linear_add, lambda *_: None
)


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


def base_product(x: Tensor, w: Tensor | NF4Weight, bias: Tensor | None) -> Tensor:
    """Compute a plain linear layer, of a dense or an NF4 weight, outside of autograd: ``(..., n)``."""
    x = autocast(x)
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(w, NF4Weight):
        y: Tensor = torch.ops.fastpeft.nf4_linear(x.reshape(-1, w.k), *w.operands, w.n, w.k, bias)
        return y.reshape(*x.shape[:-1], w.n)
    return torch.nn.functional.linear(x, w.to(x.dtype), bias)


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


@torch.no_grad()
def nf4_linear_add_(y: Tensor, x: Tensor, w: NF4Weight) -> Tensor:
    """Add a product with an NF4 weight in place: ``y += x @ w.T``, both rounded to the dtype of ``y``.

    For up to 64 tokens one launch on CUDA, as the sum at the end of a decoder layer's step; nothing is differentiated.

    Args:
        y: ``(..., n)``, written.
        x: ``(..., k)``, dtype and device of ``y``.
        w: of ``(n, k)``.
    Returns:
        ``y``.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_linear("nf4_linear_add_", x, w.n, w.k, w.device, None)
    if y.shape != (*x.shape[:-1], w.n) or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"nf4_linear_add_: y is {tuple(y.shape)} of {y.dtype} on {y.device}; it must be "
            f"{(*x.shape[:-1], w.n)} of {x.dtype} on {x.device}"
        )
    torch.ops.fastpeft.nf4_linear_add_(y, x, *w.operands, w.n, w.k)
    return y
