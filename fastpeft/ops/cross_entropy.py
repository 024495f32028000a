"""The head and its loss without the logits of more than a chunk of tokens: cross-entropy and log-probabilities.

A chunk's logits are the framework's product, in the dtype of ``hidden``, into a workspace that all chunks use in turn.
One kernel (csrc/include/fastpeft/cross_entropy.h) makes losses of them and, where gradients are wanted, writes the
gradient by the logits in their place; two more products make the gradients by ``hidden`` and ``weight`` of it.

A mean or a sum knows the gradient of each token's loss but for a factor, so all that is done in forward, and backward
multiplies by the factor, in place, and not at all when it is 1. Per-token losses keep the log-sum-exp of each token;
their backward computes the logits again.

Rounding: in float16 the gradient by the logits would underflow under a factor such as 1 / tokens; so the kernel applies
what is left of it beside a power of two, which comes in afterwards and rounds nothing. bfloat16 has the range for all.
The gradient by the weight is summed over chunks in the weight's dtype up to four chunks of bfloat16, whose roundings
together are within twice that of one product; beyond, and always in float16, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops.nf4 import autocast

_WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
_ROW_STEP = 128  # chunks are multiples of a product's tile
_MOST_ROUNDED_CHUNKS = 4
_SLAB_ROWS = 8192
_OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
_OPTIONS = "int ignore_index, float label_smoothing, float softcap, float logit_scale, int chunk_tokens"


class _Options(NamedTuple):
    """The scalars all ops take, in the order of ``_OPTIONS``."""

    ignore_index: int
    label_smoothing: float
    softcap: float  # 0 for none
    logit_scale: float
    chunk_tokens: int  # 0 to choose


# --- chunks ---
def _chunk_rows(tokens: int, row_bytes: int, device: torch.device, chunk_tokens: int) -> int:
    """Tokens of a chunk: what the workspace holds, shared out evenly."""
    if chunk_tokens:
        return min(chunk_tokens, tokens)
    most = max(_ROW_STEP, _WORKSPACE_BYTES[device.type] // row_bytes // _ROW_STEP * _ROW_STEP)
    even = -(-tokens // -(-tokens // most))
    return min(tokens, -(-even // _ROW_STEP) * _ROW_STEP)


def _real(dtype: torch.dtype) -> torch.dtype:
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

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: _Options) -> None:
        self.hidden, self.weight, self.bias, self.target, self.options = hidden, weight, bias, target, options
        self.tokens, self.v = hidden.shape[0], weight.shape[0]
        # On CUDA the kernels want rows on the 16-byte grid, and products are faster on it. On the CPU torch's 16-bit
        # product reads what lies between rows.
        each = 16 // hidden.dtype.itemsize if hidden.is_cuda else 1
        self._stride = -(-self.v // each) * each
        self._rows = 0
        if self.tokens:
            row_bytes = self._stride * hidden.dtype.itemsize
            self._rows = _chunk_rows(self.tokens, row_bytes, hidden.device, options.chunk_tokens)

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
        sum_dtype = weight_dtype if weight_dtype == compute else _real(compute)
        if compute == torch.float16 or (compute == torch.bfloat16 and chunks.count > _MOST_ROUNDED_CHUNKS):
            sum_dtype = torch.float32
        self._hidden = hidden.new_empty(hidden.shape if wanted[0] else (0,))
        self._weight = weight.new_empty(weight.shape if wanted[1] else (0,), dtype=sum_dtype)
        self._bias = weight.new_zeros((chunks.v if wanted[2] else 0,), dtype=_real(compute))
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


def _kept(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: _Options) -> _Kept:
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
    kept = _kept(hidden, weight, bias, target, _Options(*options))
    chunks = kept.chunks
    losses, lse = (hidden.new_empty((chunks.tokens,), dtype=_real(hidden.dtype)) for _ in range(2))
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
    losses = hidden.new_empty((target.numel(),), dtype=_real(hidden.dtype))
    return losses, torch.empty_like(losses), losses.new_empty((target.numel() if rest[-1] else 0,))


def _loss_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, divisor: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *options, want_hidden, want_weight, want_bias = rest
    kept = _kept(hidden, weight, bias, target, _Options(*options))
    chunks = kept.chunks
    in_float = hidden.dtype == torch.float16  # the sum before the power of two comes in can be beyond float16
    gradients = _Gradients(chunks, (want_hidden, want_weight, want_bias), weight.dtype, in_float)
    losses, lse = (hidden.new_empty((chunks.tokens,), dtype=_real(hidden.dtype)) for _ in range(2))
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
    losses = hidden.new_empty((target.numel(),), dtype=_real(hidden.dtype))
    weight_dtype = torch.float32 if hidden.dtype == torch.float16 else weight.dtype
    return losses, torch.empty_like(losses), *_gradients_fake(hidden, weight, rest[-3:], weight_dtype)


def _gradients_fake(
    hidden: Tensor, weight: Tensor, wanted: Sequence[bool], weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    want_hidden, want_weight, want_bias = wanted
    return (
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,), dtype=weight_dtype),
        weight.new_empty((weight.shape[0] if want_bias else 0,), dtype=_real(hidden.dtype)),
    )


def _loss_backward(
    grad: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *options, want_hidden, want_weight, want_bias = rest
    kept = _kept(hidden, weight, bias, target, _Options(*options))
    chunks = kept.chunks
    grad, lse = kept.pick(grad.reshape(-1)), kept.pick(lse)
    peak = None
    if hidden.dtype == torch.float16 and chunks.tokens:  # a token's share of a mean would underflow
        peak = _power_above(grad.abs().amax().clamp(min=torch.finfo(grad.dtype).tiny))
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


def _power_above(x: Tensor) -> Tensor:
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


# --- autograd ---
class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        options: _Options,
        wanted: tuple[bool, bool, bool],
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        losses, lse, entropies = torch.ops.fastpeft.linear_loss(hidden, weight, bias, target, *options, entropy)
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.constants = (options, wanted)
        ctx.mark_non_differentiable(entropies)
        return losses, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, lse = ctx.saved_tensors
        options, wanted = ctx.constants
        grads = torch.ops.fastpeft.linear_loss_backward(grad, lse, hidden, weight, bias, target, *options, *wanted)
        return *_as_wanted(grads, wanted, weight, bias), *(None,) * 4


class _ReducedLoss(torch.autograd.Function):
    """The sum of the losses over ``divisor``, with the gradients made in forward.

    They are attributes, not saved tensors, so that backward can give them away, which spares a copy of the weight's
    gradient where it becomes ``.grad``. A second backward over a retained graph computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        divisor: Tensor | None,
        options: _Options,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        now, later = divisor, None
        if hidden.dtype == torch.float16 and divisor is not None:
            later = _power_above(divisor)
            now = divisor / later
        losses, lse, *grads = torch.ops.fastpeft.linear_loss_grads(hidden, weight, bias, target, now, *options, *wanted)
        ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.constants = (options, wanted)
        ctx.divisor, ctx.later, ctx.grads = divisor, later, grads
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return _reduced(losses, divisor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        options, wanted = ctx.constants
        if torch.compiler.is_compiling():  # a compiled graph may not write to what its forward saved
            factor = grad if ctx.later is None else grad / ctx.later
            grads = [made * factor for made in ctx.grads]
        elif ctx.grads is not None:
            grads, ctx.grads = ctx.grads, None
            for made in grads:
                torch.ops.fastpeft.scale_(made, grad, ctx.later)
        else:
            hidden, weight, bias, target, lse = ctx.saved_tensors
            each = (grad if ctx.divisor is None else grad / ctx.divisor).expand(lse.shape)
            grads = torch.ops.fastpeft.linear_loss_backward(each, lse, hidden, weight, bias, target, *options, *wanted)
        dhidden, dweight, dbias = grads
        return (
            dhidden if wanted[0] else None,
            dweight.to(ctx.weight_dtype) if wanted[1] else None,
            dbias.to(ctx.bias_dtype) if wanted[2] else None,
            *(None,) * 4,
        )


def _as_wanted(
    grads: Sequence[Tensor], wanted: Sequence[bool], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    dhidden, dweight, dbias = grads
    return (
        dhidden if wanted[0] else None,
        dweight.to(weight.dtype) if wanted[1] else None,
        dbias.to(bias.dtype) if wanted[2] and bias is not None else None,
    )


def _reduced(losses: Tensor, divisor: Tensor | None) -> Tensor:
    total = losses.sum()
    return total if divisor is None else total / divisor


# --- what users call ---
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy of a linear head, ``cross_entropy(logit_scale * cap(hidden @ weight.T + bias), target)``.

    ``cap(x)`` is ``softcap * tanh(x / softcap)``. The logits exist for a chunk of tokens at a time. Differentiable in
    ``hidden``, ``weight`` and ``bias``; a frozen weight costs one product less. Equal calls give equal bits.

    Args:
        hidden: ``(tokens, k)`` or ``(b, t, k)``, float32, float16 or bfloat16 (float64 on the CPU); under autocast it
            and the weight are cast to autocast's dtype.
        weight: ``(v, k)``, dtype of ``hidden``.
        target: ``(tokens,)`` or ``(b, t)``, int64, each from 0 to ``v - 1`` or ``ignore_index``.
        bias: ``(v,)``.
        ignore_index: target of tokens that do not count.
        label_smoothing: share of the target that is spread over all columns, in [0, 1].
        reduction: ``mean`` over the tokens that count, ``sum``, or ``none`` for a loss a token. As in torch, the mean
            of no tokens is NaN (its gradient here is zero), and an ignored token's loss is 0.
        num_items: with ``mean`` or ``sum``, what the sum is divided by instead, such as the number of targets of all
            micro-batches; a tensor is best on the device of ``hidden``.
        softcap: bound of the logits, as in Gemma 2.
        logit_scale: factor of the (capped) logits.
        chunk_tokens: tokens whose logits exist at a time; by default as many as fit 512 MB (on a CPU 32 MB).
    Returns:
        The loss, float32 (float64 for float64): a scalar, or of the shape of ``target`` for ``none``.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an option out of its range, or, on the CPU, a target out
            of its range. On CUDA such a target makes the loss and the gradients NaN, because looking would mean waiting
            for the device.
    Source:
        Gradients made in forward: mgmalek/efficient_cross_entropy and Liger, arXiv 2410.10989; chunks: Cut your losses
        in large-vocabulary language models, arXiv 2411.09009, section 4; softcap: Gemma 2, arXiv 2408.00118.
    """
    name = "linear_cross_entropy"
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}; it must be from 0 to 1")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    if reduction == "none" and num_items is not None:
        raise ValueError(f"{name}: num_items divides a sum; it does not go with reduction='none'")
    options = _options(name, ignore_index, label_smoothing, softcap, logit_scale, chunk_tokens)
    hidden = _checked(name, hidden, weight, target, bias)
    wanted = _wanted(hidden, weight, bias)
    if reduction == "none":
        losses, _ = _token_losses(hidden, weight, bias, target, options, wanted, entropy=False)
        return losses.reshape(target.shape)
    divisor = _divisor(name, hidden, target, ignore_index, reduction, num_items)
    if any(wanted):
        out: Tensor = _ReducedLoss.apply(hidden, weight, bias, target, divisor, options, wanted)  # type: ignore[no-untyped-call]
        return out
    losses, _, _ = torch.ops.fastpeft.linear_loss(hidden, weight, bias, target, *options, False)
    return _reduced(losses, divisor)


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    entropy: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under a linear head, ``log_softmax(cap(hidden @ weight.T + bias) / temperature)``.

    For DPO and PPO: differentiable in ``hidden``, ``weight`` and ``bias`` with any gradient a token. Kept for backward
    are the inputs and the log-sum-exp of each token; the logits are computed again, chunk by chunk.

    Args:
        hidden: ``(tokens, k)`` or ``(b, t, k)``, as for :func:`linear_cross_entropy`.
        weight: ``(v, k)``.
        target: ``(tokens,)`` or ``(b, t)``, int64.
        bias: ``(v,)``.
        ignore_index: target of tokens that do not count.
        softcap: bound of the logits, as in Gemma 2.
        temperature: divides the (capped) logits.
        chunk_tokens: tokens whose logits exist at a time.
        entropy: return also the entropy of each token's distribution, without gradient.
    Returns:
        Log-probabilities of the shape of ``target``, float32, 0 where it is ignored; with ``entropy`` a pair of them
        and the entropies, 0 likewise.
    Raises:
        ValueError: as :func:`linear_cross_entropy`.
    """
    name = "linear_logprobs"
    if not temperature > 0.0:
        raise ValueError(f"{name}: temperature is {temperature}; it must be positive")
    options = _options(name, ignore_index, 0.0, softcap, 1.0 / temperature, chunk_tokens)
    hidden = _checked(name, hidden, weight, target, bias)
    wanted = _wanted(hidden, weight, bias)
    losses, entropies = _token_losses(hidden, weight, bias, target, options, wanted, entropy)
    logprobs = (0.0 - losses).reshape(target.shape)  # -losses would make the ignored ones -0
    return (logprobs, entropies.reshape(target.shape)) if entropy else logprobs


def _token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: _Options,
    wanted: tuple[bool, bool, bool],
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    if any(wanted):
        losses, entropies = _TokenLosses.apply(hidden, weight, bias, target, options, wanted, entropy)  # type: ignore[no-untyped-call]
    else:
        losses, _, entropies = torch.ops.fastpeft.linear_loss(hidden, weight, bias, target, *options, entropy)
    return losses, entropies


def _wanted(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Which gradients backward may ask for: none under ``no_grad``, where nothing is computed or kept."""
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


def _divisor(
    name: str, hidden: Tensor, target: Tensor, ignore_index: int, reduction: str, num_items: int | Tensor | None
) -> Tensor | None:
    real = _real(hidden.dtype)
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"{name}: num_items has shape {tuple(num_items.shape)}; it must be one number")
        return num_items.detach().reshape(()).to(hidden.device, real, non_blocking=True)
    if num_items is not None:
        if not num_items > 0:
            raise ValueError(f"{name}: num_items is {num_items}; it must be positive")
        return torch.full((), float(num_items), dtype=real, device=hidden.device)
    return (target != ignore_index).sum().to(real) if reduction == "mean" else None


def _options(
    name: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    chunk_tokens: int | None,
) -> _Options:
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{name}: softcap is {softcap}; it must be positive, or None for no cap")
    if not isfinite(logit_scale):
        raise ValueError(f"{name}: logit_scale is {logit_scale}; it must be finite")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{name}: chunk_tokens is {chunk_tokens}; it must be at least 1, or None to choose")
    return _Options(ignore_index, label_smoothing, softcap or 0.0, logit_scale, chunk_tokens or 0)


def _checked(name: str, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
    """Refuse what does not fit; ``hidden`` in the dtype of the products."""
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}; it must be (v, k)")
    v, k = weight.shape
    if hidden.dim() < 2 or hidden.shape[-1] != k:
        raise ValueError(f"{name}: hidden has shape {tuple(hidden.shape)}; a weight of ({v}, {k}) needs (tokens, {k})")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: target has shape {tuple(target.shape)}; hidden of {tuple(hidden.shape)} needs "
            f"{tuple(hidden.shape[:-1])}"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"{name}: target is {target.dtype}; it must be int64")
    if bias is not None and tuple(bias.shape) != (v,):
        raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}; it must be ({v},)")
    devices = {tensor.device for tensor in (hidden, weight, target, bias) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"{name}: tensors are on {', '.join(sorted(map(str, devices)))}; move them together")
    hidden = autocast(hidden)
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"{name}: hidden is {hidden.dtype} and weight {weight.dtype}; cast one, or use autocast")
    native.dtype_number(name, hidden.dtype)
    return hidden
