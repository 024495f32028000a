"""Slow, plain and independent versions of what is timed; every contender is checked against them first.

They use nothing of fastpeft but the fields of ``NF4Weight``, and are written from the format: flat row-major blocks,
high nibble first, per-block absmax, and 8-bit scales over 256 blocks with an offset.

Source: QLoRA, arXiv 2305.14314 (NF4, double quantisation); 8-bit optimizers, arXiv 2110.02861 (dynamic map).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.case import Check
from fastpeft.ops import NF4Weight

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NESTED_BLOCK = 256


@cache
def dynamic_map() -> Tensor:
    """The signed 8-bit map of nested scales, ascending: seven decades, each with twice the levels of the one below."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1)
        centres = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        levels += centres + [-centre for centre in centres]
    return torch.tensor(sorted(levels))


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Each element replaced by the nearest of the ascending levels."""
    return levels[torch.bucketize(x, (levels[:-1] + levels[1:]) / 2, out_int32=True)]


def _block_absmax(flat: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block."""
    return pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size).abs().amax(dim=1)


def _scale_blocks(flat: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """A flat tensor with each block multiplied by its scale."""
    blocks = pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    return (blocks * scale.flatten()[:, None]).flatten()[: flat.numel()]


def _divide_blocks(flat: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """A flat tensor with each block divided by its absmax; zeros where that is zero."""
    return _scale_blocks(flat, torch.where(absmax > 0, 1 / absmax, 0.0), block_size)


def nf4_round_trip(w: Tensor, block_size: int = 64) -> Tensor:
    """What double-quantised NF4 makes of a weight: quantised and decoded, float32, in its shape."""
    flat = w.float().flatten()
    absmax = _block_absmax(flat, block_size)
    offset = absmax.mean()
    nested_absmax = _block_absmax(absmax - offset, NESTED_BLOCK)
    nested = _nearest(_divide_blocks(absmax - offset, nested_absmax, NESTED_BLOCK), dynamic_map().to(w.device))
    codes = _nearest(_divide_blocks(flat, absmax, block_size), torch.tensor(NF4_LEVELS, device=w.device))
    absmax = _scale_blocks(nested, nested_absmax, NESTED_BLOCK) + offset
    return _scale_blocks(codes, absmax, block_size).view(w.shape)


def nf4_decode(w: NF4Weight) -> Tensor:
    """Decode a packed weight to float32 with table look-ups."""
    levels = torch.tensor(NF4_LEVELS, device=w.codes.device)
    codes = w.codes.flatten()
    values = torch.stack([levels[(codes >> 4).int()], levels[(codes & 15).int()]], dim=1).flatten()
    absmax = w.absmax.flatten()
    if w.double_quant:
        assert w.nested_map is not None and w.nested_absmax is not None and w.offset is not None
        absmax = _scale_blocks(w.nested_map.flatten()[absmax.int()], w.nested_absmax, NESTED_BLOCK) + w.offset
    return _scale_blocks(values[: math.prod(w.shape)], absmax, w.block_size).view(w.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows over their root mean square, times the weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``(b, heads, t, d)`` as products of complex numbers, real parts in the first half."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, None, :, :half]
    return torch.cat((turned.real, turned.imag), -1)


def relative_error(out: Tensor, ref: Tensor) -> float:
    """``|out - ref| / |ref|`` in float64; infinite when the shapes differ."""
    if out.shape != ref.shape:
        return math.inf
    ref = ref.double()
    return float((out.double() - ref).norm() / ref.norm())


def close_to(reference: Callable[[], Sequence[Tensor]], tolerance: float) -> Check:
    """A check of each output against a reference, which is computed when first needed and kept."""
    kept: list[Tensor] = []

    def error(outputs: Sequence[Tensor]) -> float:
        if not kept:
            kept.extend(reference())
        if len(outputs) != len(kept):
            return math.inf
        return _largest(relative_error(out, ref) for out, ref in zip(outputs, kept, strict=True))

    return Check(error, tolerance)


def dropout_noise(reference: Callable[[], Sequence[tuple[Tensor, Tensor]]], p: float, tolerance: float) -> Check:
    """A check of outputs whose dropout mask is not known.

    Inverted dropout at rate ``p`` leaves the adapter's expectation as it is and adds noise of ``sqrt(p / (1 - p))``
    of its norm, in the output and in every gradient. The error is how far, relatively, the noise is from that.

    Args:
        reference: pairs of the output without dropout and the adapter's share of it.
        p: dropout probability.
        tolerance: largest relative deviation.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    expected = math.sqrt(p / (1 - p))

    def error(outputs: Sequence[Tensor]) -> float:
        if not kept:
            kept.extend(reference())
        if len(outputs) != len(kept):
            return math.inf
        return _largest(
            abs(float((out.double() - whole).norm() / share.norm()) / expected - 1)
            if out.shape == whole.shape
            else math.inf
            for out, (whole, share) in zip(outputs, kept, strict=True)
        )

    return Check(error, tolerance, measure="deviation of the dropout noise")


def _largest(errors: Iterable[float]) -> float:
    """The largest error, or NaN when any is NaN (``max`` alone may lose it)."""
    values = list(errors)
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def head_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, grad: Tensor, rows: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a linear head in float64, and the gradients of their sum weighted by ``grad``; ``rows`` at a time.

    Returns:
        ``(tokens,)`` losses, and the gradients by ``hidden`` and ``weight``.
    """
    hidden, weight, grad = (tensor.detach().double() for tensor in (hidden, weight, grad))
    losses, dhidden, dweight = [], [], torch.zeros_like(weight)
    for h, t, g in zip(hidden.split(rows), target.split(rows), grad.split(rows), strict=True):
        logprobs = (h @ weight.T).log_softmax(dim=1)
        losses.append(-logprobs.gather(1, t[:, None])[:, 0])
        dlogits = logprobs.exp_()
        dlogits[torch.arange(len(t), device=t.device), t] -= 1
        dlogits *= g[:, None]
        dhidden.append(dlogits @ weight)
        dweight += dlogits.T @ h
    return torch.cat(losses), torch.cat(dhidden), dweight


def adamw(
    start: Tensor, grads: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> Tensor:
    """Parameters after one AdamW step a gradient, in float64.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    """
    p = start.double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step, grad in enumerate(grads, start=1):
        g = grad.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p * (1 - lr * decay)
        p = p - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    return p
