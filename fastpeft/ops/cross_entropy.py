"""The head and its loss without the logits of more than a chunk of tokens: cross-entropy and log-probabilities.

A mean or a sum knows the gradient of each token's loss but for a factor, so all that is done in forward, and backward
multiplies by the factor, in place, and not at all when it is 1. Per-token losses keep the log-sum-exp of each token;
their backward computes the logits again. The chunks and the ops are in ``linear_loss.py``.

Rounding: in float16 the gradient by the logits would underflow under a factor such as 1 / tokens; so the kernel applies
what is left of it beside a power of two, which comes in afterwards and rounds nothing. bfloat16 has the range for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops.linear_loss import LossOptions, power_above, real_dtype
from fastpeft.ops.nf4 import autocast


# --- autograd ---
class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        options: LossOptions,
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
        options: LossOptions,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        now, later = divisor, None
        if hidden.dtype == torch.float16 and divisor is not None:
            later = power_above(divisor)
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
    options: LossOptions,
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
    real = real_dtype(hidden.dtype)
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
) -> LossOptions:
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{name}: softcap is {softcap}; it must be positive, or None for no cap")
    if not isfinite(logit_scale):
        raise ValueError(f"{name}: logit_scale is {logit_scale}; it must be finite")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{name}: chunk_tokens is {chunk_tokens}; it must be at least 1, or None to choose")
    return LossOptions(ignore_index, label_smoothing, softcap or 0.0, logit_scale, chunk_tokens or 0)


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
