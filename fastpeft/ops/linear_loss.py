"""The registered ops of the head and its loss: chunks of logits, and the gradients that are summed over them.

A chunk's logits are the framework's product, in the dtype of ``hidden``, into a workspace that all chunks use in turn.
One kernel (csrc/include/fastpeft/cross_entropy.h) makes losses of them and, where gradients are wanted, writes the
gradient by the logits in their place; two more products make the gradients by ``hidden`` and ``weight`` of it.

The gradient by the weight is summed over chunks in the weight's dtype up to four chunks of bfloat16, whose roundings
together are within twice that of one product; beyond, and always in float16, in float32. A sum in bfloat16 reads and
writes half as much a chunk, and takes half the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.ops import native

_WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
_ROW_STEP = 128  # chunks are multiples of a product's tile
_MOST_ROUNDED_CHUNKS = 4
_SLAB_ROWS = 8192
_OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
_OPTIONS = "int ignore_index, float label_smoothing, float softcap, float logit_scale, int chunk_tokens"


class LossOptions(NamedTuple):
    """The scalars all ops take, in the order of ``_OPTIONS``."""

    ignore_index: int
    label_smoothing: float
    softcap: float  # 0 for none
    logit_scale: float
    chunk_tokens: int  # 0 to choose


# --- chunks ---
def chunk_rows(tokens: int, row_bytes: int, device_type: str, chunk_tokens: int = 0) -> int:
    """Tokens of a chunk: what the workspace holds, shared out evenly.

    Args:
        tokens: of the call, at least one.
        row_bytes: of one token's logits.
        device_type: "cpu" or "cuda".
        chunk_tokens: the most that was asked for; 0 leaves it open.
    """
    if chunk_tokens:
        return min(chunk_tokens, tokens)
    most = max(_ROW_STEP, _WORKSPACE_BYTES[device_type] // row_bytes // _ROW_STEP * _ROW_STEP)
    even = -(-tokens // -(-tokens // most))
    return min(tokens, -(-even // _ROW_STEP) * _ROW_STEP)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses and sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Chunks:
    """The products of one call, chunk by chunk.

    Args:
        hidden: ``(tokens, k)``.
        weight: ``(v, k)``, in the dtype of ``hidden``.
        bias: ``(v,)`` likewise, or None.
        target: ``(tokens,)``, contiguous.
        options: of the call.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LossOptions
    ) -> None:
        self.hidden, self.weight, self.bias, self.target, self.options = hidden, weight, bias, target, options
        self.tokens, self.v = hidden.shape[0], weight.shape[0]
        # On CUDA the kernels want rows on the 16-byte grid, and products are faster on it. On the CPU torch's 16-bit
        # product reads what lies between rows.
        each = 16 // hidden.dtype.itemsize if hidden.is_cuda else 1
        self._stride = -(-self.v // each) * each
        self._rows = 0
        if self.tokens:
            row_bytes = self._stride * hidden.dtype.itemsize
            self._rows = chunk_rows(self.tokens, row_bytes, hidden.device.type, options.chunk_tokens)

    @property
    def count(self) -> int:
        return -(-self.tokens // self._rows) if self._rows else 0

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """First token, one past the last, and their logits."""
        if not self.tokens:
            return
        buffer = self.hidden.new_empty((self._rows, self._stride))
        weight = self.weight.t()
        for begin in range(0, self.tokens, self._rows):
            end = min(self.tokens, begin + self._rows)
            logits = buffer[: end - begin, : self.v]
            if self.bias is None:
                torch.mm(self.hidden[begin:end], weight, out=logits)
            else:
                torch.addmm(self.bias, self.hidden[begin:end], weight, out=logits)
            yield begin, end, logits

    def native_rows(self, begin: int, end: int, logits: Tensor) -> Any:
        """The chunk as the native functions take it."""
        return native.logit_rows(
            logits.data_ptr(),
            native.dtype_number("linear_cross_entropy", logits.dtype),
            end - begin,
            self.v,
            self._stride,
            self.target.data_ptr() + begin * self.target.itemsize,
            self.options.ignore_index,
            self.options.label_smoothing,
            self.options.logit_scale,
            self.options.softcap,
        )

    def at(self, values: Tensor, begin: int) -> int:
        """Address of a token's value; 0 in an empty tensor."""
        return values.data_ptr() + begin * values.itemsize if values.numel() else 0


class _Gradients:
    """Sums up what the chunks' gradients by the logits make; tensors that are not wanted are empty.

    Args:
        chunks: whose products are differentiated.
        wanted: whether gradients by hidden, weight and bias are wanted.
        weight_dtype: of the weight that is trained, which may have been cast.
        in_float: return the weight's gradient in float32 whatever its dtype.
    """

    def __init__(self, chunks: _Chunks, wanted: Sequence[bool], weight_dtype: torch.dtype, in_float: bool) -> None:
        self._chunks, self._wanted = chunks, wanted
        hidden, weight, compute = chunks.hidden, chunks.weight, chunks.hidden.dtype
        self._out_dtype = torch.float32 if in_float else weight_dtype
        sum_dtype = weight_dtype if weight_dtype == compute else real_dtype(compute)
        if compute == torch.float16 or (compute == torch.bfloat16 and chunks.count > _MOST_ROUNDED_CHUNKS):
            sum_dtype = torch.float32
        self._hidden = hidden.new_empty(hidden.shape if wanted[0] else (0,))
        self._weight = weight.new_empty(weight.shape if wanted[1] else (0,), dtype=sum_dtype)
        self._bias = weight.new_zeros((chunks.v if wanted[2] else 0,), dtype=real_dtype(compute))
        if wanted[1] and not chunks.count:
            self._weight.zero_()

    def add(self, begin: int, end: int, dlogits: Tensor) -> None:
        want_hidden, want_weight, want_bias = self._wanted
        if want_hidden:
            torch.mm(dlogits, self._chunks.weight, out=self._hidden[begin:end])
        if want_weight:
            _add_product(self._weight, dlogits.t(), self._chunks.hidden[begin:end], first=begin == 0)
        if want_bias:
            self._bias += dlogits.sum(0, dtype=self._bias.dtype)

    def result(self, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The three gradients, multiplied by ``factor``."""
        if factor is not None:
            for gradient in (self._hidden, self._weight, self._bias):
                _scale(gradient, factor, None)
        return self._hidden, self._weight.to(self._out_dtype), self._bias


def _add_product(to: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``to += a @ b``, or ``to = a @ b``; a float32 ``to`` takes the unrounded product of 16-bit factors on CUDA."""
    if to.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=to)
        else:
            to.addmm_(a, b)
    elif a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # since torch 2.8
        if first:
            torch.ops.aten.mm.dtype_out(a, b, to.dtype, out=to)
        else:
            torch.ops.aten.addmm.dtype_out(to, a, b, to.dtype, out=to)
    else:  # each chunk's part rounded once
        for begin in range(0, a.shape[0], _SLAB_ROWS):
            part, rows = a[begin : begin + _SLAB_ROWS] @ b, to[begin : begin + _SLAB_ROWS]
            if first:
                rows.copy_(part)
            else:
                rows += part


# --- ops ---
class _Kept(NamedTuple):
    """The call on the rows that count, and where they were; on CUDA all rows, as choosing would wait for the device."""

    chunks: _Chunks
    rows: Tensor | None

    def pick(self, values: Tensor) -> Tensor:
        return values.contiguous() if self.rows is None else values[self.rows]

    def spread(self, values: Tensor, tokens: int) -> Tensor:
        """Back to all tokens, with zeros where the target is ignored; an empty tensor stays empty."""
        if self.rows is None or (values.shape[0] == 0 and self.chunks.tokens):
            return values
        return values.new_zeros((tokens, *values.shape[1:])).index_copy_(0, self.rows, values)


def _kept(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LossOptions) -> _Kept:
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).contiguous()
    rows = None
    if target.device.type == "cpu":
        is_target = target != options.ignore_index
        outside = is_target & ((target < 0) | (target >= weight.shape[0]))
        if outside.any():
            at = int(outside.nonzero()[0])
            raise ValueError(
                f"linear_cross_entropy: target {at} is {int(target[at])}; it must be from 0 to {weight.shape[0] - 1}, "
                f"or {options.ignore_index} to be ignored"
            )
        if not is_target.all():
            rows = is_target.nonzero()[:, 0]
            hidden, target = hidden[rows], target[rows]
    cast_bias = None if bias is None else bias.to(hidden.dtype)
    return _Kept(_Chunks(hidden, weight.to(hidden.dtype), cast_bias, target, options), rows)


def _holds_rows(where: Tensor) -> bool:
    return where.is_cuda and native.device_limits(where.device)[-1]


def _loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *options, entropy = rest
    kept = _kept(hidden, weight, bias, target, LossOptions(*options))
    chunks = kept.chunks
    losses, lse = (hidden.new_empty((chunks.tokens,), dtype=real_dtype(hidden.dtype)) for _ in range(2))
    entropies = losses.new_empty((chunks.tokens if entropy else 0,))
    hold = _holds_rows(hidden)
    for begin, end, logits in chunks:
        outputs = (chunks.at(losses, begin), chunks.at(lse, begin), chunks.at(entropies, begin))
        native.call("cross_entropy", logits, chunks.native_rows(begin, end, logits), *outputs, False, 0, hold)
    tokens = target.numel()
    spread = kept.spread(entropies, tokens) if entropy else entropies
    return kept.spread(losses, tokens), kept.spread(lse, tokens), spread


def _loss_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    losses = hidden.new_empty((target.numel(),), dtype=real_dtype(hidden.dtype))
    return losses, torch.empty_like(losses), losses.new_empty((target.numel() if rest[-1] else 0,))


def _loss_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, divisor: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *options, want_hidden, want_weight, want_bias = rest
    kept = _kept(hidden, weight, bias, target, LossOptions(*options))
    chunks = kept.chunks
    in_float = hidden.dtype == torch.float16  # the sum before the power of two comes in can be beyond float16
    gradients = _Gradients(chunks, (want_hidden, want_weight, want_bias), weight.dtype, in_float)
    losses, lse = (hidden.new_empty((chunks.tokens,), dtype=real_dtype(hidden.dtype)) for _ in range(2))
    by, hold = native.address(divisor), _holds_rows(hidden)
    for begin, end, logits in chunks:
        outputs = (chunks.at(losses, begin), chunks.at(lse, begin), 0)
        native.call("cross_entropy", logits, chunks.native_rows(begin, end, logits), *outputs, True, by, hold)
        gradients.add(begin, end, logits)
    dhidden, dweight, dbias = gradients.result()
    tokens = target.numel()
    if want_hidden:
        dhidden = kept.spread(dhidden, tokens).reshape(hidden.shape)
    return kept.spread(losses, tokens), kept.spread(lse, tokens), dhidden, dweight, dbias


def _loss_grads_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, divisor: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    losses = hidden.new_empty((target.numel(),), dtype=real_dtype(hidden.dtype))
    weight_dtype = torch.float32 if hidden.dtype == torch.float16 else weight.dtype
    return losses, torch.empty_like(losses), *_gradients_fake(hidden, weight, rest[-3:], weight_dtype)


def _gradients_fake(
    hidden: Tensor, weight: Tensor, wanted: Sequence[bool], weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    want_hidden, want_weight, want_bias = wanted
    return (
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,), dtype=weight_dtype),
        weight.new_empty((weight.shape[0] if want_bias else 0,), dtype=real_dtype(hidden.dtype)),
    )


def _loss_backward(
    grad: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *options, want_hidden, want_weight, want_bias = rest
    kept = _kept(hidden, weight, bias, target, LossOptions(*options))
    chunks = kept.chunks
    grad, lse = kept.pick(grad.reshape(-1)), kept.pick(lse)
    peak = None
    if hidden.dtype == torch.float16 and chunks.tokens:  # a token's share of a mean would underflow
        peak = power_above(grad.abs().amax().clamp(min=torch.finfo(grad.dtype).tiny))
        grad = grad / peak
    gradients = _Gradients(chunks, (want_hidden, want_weight, want_bias), weight.dtype, in_float=False)
    for begin, end, logits in chunks:
        rows = chunks.native_rows(begin, end, logits)
        native.call("cross_entropy_backward", logits, rows, chunks.at(lse, begin), chunks.at(grad, begin))
        gradients.add(begin, end, logits)
    dhidden, dweight, dbias = gradients.result(peak)
    if want_hidden:
        dhidden = kept.spread(dhidden, target.numel()).reshape(hidden.shape)
    return dhidden, dweight, dbias


def _loss_backward_fake(
    grad: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_fake(hidden, weight, rest[-3:], weight.dtype)


def power_above(x: Tensor) -> Tensor:
    """The power of two at or above; 0 for 0."""
    return x.log2().ceil().exp2()


def _scale(x: Tensor, factor: Tensor, divisor: Tensor | None) -> None:
    if x.numel():
        number = native.dtype_number("scale", x.dtype)
        native.call("scale", x, x.data_ptr(), number, x.numel(), factor.data_ptr(), native.address(divisor))


def _scale_fake(x: Tensor, factor: Tensor, divisor: Tensor | None) -> None:
    return None


native.define(f"linear_loss({_OPERANDS}, {_OPTIONS}, bool entropy) -> (Tensor, Tensor, Tensor)", _loss, _loss_fake)
native.define(
    f"linear_loss_grads({_OPERANDS}, Tensor? divisor, {_OPTIONS}, bool want_dhidden, bool want_dweight, "
    "bool want_dbias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss_grads,
    _loss_grads_fake,
)
native.define(
    f"linear_loss_backward(Tensor grad, Tensor lse, {_OPERANDS}, {_OPTIONS}, bool want_dhidden, bool want_dweight, "
    "bool want_dbias) -> (Tensor, Tensor, Tensor)",
    _loss_backward,
    _loss_backward_fake,
)
native.define("scale_(Tensor(a!) x, Tensor factor, Tensor? divisor) -> ()", _scale, _scale_fake)
