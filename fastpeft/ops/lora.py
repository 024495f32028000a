"""LoRA linear over a dense or an NF4 base: ``y = x W^T + s (drop(x) A^T) B^T + bias``, alone or several that share x.

Kept for backward are x and ``drop(x) A^T`` only: the dropped x is made again from its seed. A and B are float32 master
weights, and their gradients come back in float32. Where `lora_linear_plan` says fused, A and B are read by the kernels
of `lora_kernels`; elsewhere they are cast to the dtype of x, once a call, and the framework multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.ops import lora_few, lora_kernels, native
from fastpeft.ops.dropout import new_seed
from fastpeft.ops.lora_kernels import Group, Member
from fastpeft.ops.nf4 import autocast, check_linear, shaped
from fastpeft.ops.nf4_weight import NF4Weight

# Lists with an entry for each layer, but `bases` with five: a dense weight and None, or codes and the tensors that
# follow. Block sizes of dense weights are 0.
_GROUP = (
    "Tensor?[] bases, int[] block_sizes, SymInt[] n, SymInt k, Tensor[] a, Tensor[] b, float[] scales, float p, "
    "Tensor? seed"
)
_BASE_TENSORS = 5
_NESTED_MAP = 3  # of them, one tensor for all weights; torch.compile takes no autograd function that gets one twice


def _group(bases: Any, block_sizes: Any, n: Any, k: Any, a: Any, b: Any, scales: Any, p: Any, seed: Any) -> Group:
    starts = range(0, len(bases), _BASE_TENSORS)
    each = [(*bases[i : i + _BASE_TENSORS], size) for i, size in zip(starts, block_sizes, strict=True)]
    return Group([Member(*member) for member in zip(each, n, a, b, scales, strict=True)], k, p, seed)


# --- composed of the framework's products ---
def _base_product(x: Tensor, member: Member, bias: Tensor | None) -> Tensor:
    if not member.is_nf4:
        return torch.nn.functional.linear(x, member.base[0].to(x.dtype), bias)
    y: Tensor = torch.ops.fastpeft.nf4_linear(x, *member.base, member.n, x.shape[-1], bias)
    return y


def _base_dx(dy: Tensor, member: Member, k: int) -> Tensor:
    if not member.is_nf4:
        dx: Tensor = dy @ member.base[0].to(dy.dtype)
        return dx
    dx = torch.ops.fastpeft.nf4_linear_dx(dy, *member.base, member.n, k)
    return dx


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if seed is None or p == 0.0:
        return x
    out: Tensor = torch.ops.fastpeft.dropout(x, p, seed)
    return out


def _compose_forward(x2d: Tensor, group: Group, biases: Sequence[Tensor | None]) -> list[Tensor]:
    dropped = _dropped(x2d, group.p, group.seed)
    ys, xas = [], []
    for member, padded, bias in zip(group.members, group.padded_ranks, biases, strict=True):
        r = member.a.shape[0]
        xa = dropped @ member.a.to(x2d.dtype).t()
        y = _base_product(x2d, member, bias)
        y.addmm_(xa, member.b.to(x2d.dtype).t(), alpha=member.scale)
        ys.append(y)
        xas.append(torch.nn.functional.pad(xa, (0, padded - r)) if padded > r else xa)
    return [*ys, torch.cat(xas, 1) if len(xas) > 1 else xas[0]]


def _compose_backward(
    dys2d: Sequence[Tensor], x2d: Tensor, xa: Tensor, group: Group, want_dx: bool, want_dab: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    dropped = _dropped(x2d, group.p, group.seed) if want_dab else x2d
    dx = low_rank = None
    das, dbs, first = [], [], 0
    for member, padded, dy in zip(group.members, group.padded_ranks, dys2d, strict=True):
        a, b = member.a, member.b
        dxa = (dy @ b.to(dy.dtype)) * member.scale
        if want_dab:
            das.append((dxa.t() @ dropped).to(a.dtype))
            dbs.append((dy.t() @ xa[:, first : first + a.shape[0]]).to(b.dtype) * member.scale)
        if want_dx:
            base = _base_dx(dy, member, group.k)
            dx = base if dx is None else dx.add_(base)
            through = a.to(dy.dtype)
            low_rank = dxa @ through if low_rank is None else low_rank.addmm_(dxa, through)
        first += padded
    if dx is not None and low_rank is not None:
        dx.add_(_dropped(low_rank, group.p, group.seed))
    return dx, das, dbs


# --- ops ---
def _forward(x: Tensor, *rest: Any) -> list[Tensor]:
    *values, biases = rest
    group = _group(*values)
    x2d = x.reshape(-1, group.k)
    if x.is_cuda:
        x2d = x2d.contiguous()
        plan = lora_kernels.plan(group, x2d)
        if plan.fused:
            return lora_kernels.forward(x2d, group, biases, plan, x.shape[:-1])
    *ys, xa = _compose_forward(x2d, group, biases)
    return [*(shaped(y, (*x.shape[:-1], y.shape[-1])) for y in ys), xa]


def _forward_fake(x: Tensor, *rest: Any) -> list[Tensor]:
    group = _group(*rest[:-1])
    tokens = x.numel() // x.shape[-1]
    ys = [x.new_empty((*x.shape[:-1], member.n)) for member in group.members]
    return [*ys, x.new_empty((tokens, sum(group.padded_ranks)))]


def _backward(dys: Sequence[Tensor], x: Tensor, xa: Tensor, *rest: Any) -> list[Tensor]:
    *values, want_dx, want_dab = rest
    group = _group(*values)
    dys2d = [dy.reshape(-1, member.n) for dy, member in zip(dys, group.members, strict=True)]
    x2d, plan = x.reshape(-1, group.k), None
    if x.is_cuda:
        dys2d, x2d = [dy.contiguous() for dy in dys2d], x2d.contiguous()
        plan = lora_kernels.plan(group, x2d, xa, *dys2d)
    if plan is not None and plan.fused:
        dx, das, dbs = lora_kernels.backward(dys2d, x2d, xa, group, plan, want_dx, want_dab, x.shape)
        das = [da.to(member.a.dtype) for da, member in zip(das, group.members, strict=True)]
        dbs = [db.to(member.b.dtype) for db, member in zip(dbs, group.members, strict=True)]
    else:
        dx, das, dbs = _compose_backward(dys2d, x2d, xa, group, want_dx, want_dab)
    dx = x.new_empty((0,)) if dx is None else dx.reshape(x.shape)
    if not want_dab:
        das, dbs = ([t.new_empty((0,)) for t in factors] for factors in _factors(group))
    return [dx, *das, *dbs]


def _backward_fake(dys: Sequence[Tensor], x: Tensor, xa: Tensor, *rest: Any) -> list[Tensor]:
    *values, want_dx, want_dab = rest
    group = _group(*values)
    factors = [t.new_empty(t.shape if want_dab else (0,)) for kind in _factors(group) for t in kind]
    return [x.new_empty(x.shape if want_dx else (0,)), *factors]


def _factors(group: Group) -> tuple[list[Tensor], list[Tensor]]:
    return [member.a for member in group.members], [member.b for member in group.members]


native.define(  # all y, and xa
    f"lora_linear(Tensor x, {_GROUP}, Tensor?[] biases) -> Tensor[]", _forward, _forward_fake
)
native.define(  # dx, all dA, all dB
    f"lora_linear_backward(Tensor[] dys, Tensor x, Tensor xa, {_GROUP}, bool want_dx, bool want_dab) -> Tensor[]",
    _backward,
    _backward_fake,
)


# --- autograd ---
class Layers(NamedTuple):
    """LoRA linears that share x, as autograd takes them: constants, and tensors end to end."""

    constants: tuple[Any, ...]  # places of the bases' parts among the tensors, block sizes, n, k, scales, dropout
    tensors: tuple[Tensor | None, ...]  # of the bases, then each layer's a, b and bias

    def arguments(self, seed: Tensor | None) -> tuple[Any, ...]:
        """What the ops take, from ``bases`` to ``seed``."""
        places, block_sizes, n, k, scales, p = self.constants
        tensors, (a, b, _) = self.split(self.tensors)
        bases = [None if place is None else tensors[place] for place in places]
        return bases, block_sizes, n, k, a, b, scales, p, seed

    def split(self, values: Sequence[Any]) -> tuple[Sequence[Any], list[Sequence[Any]]]:
        """Of values in the order of the tensors: those of the bases, and those of a, b and bias."""
        count = len(self.constants[1])
        end = len(values) - 3 * count
        return values[:end], [values[i : i + count] for i in range(end, len(values), count)]


def layers(
    dtype: torch.dtype,
    weights: Sequence[Tensor | NF4Weight],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
    p: float,
) -> Layers:
    """Lay out what `lora_linear_group` got; biases are cast to ``dtype``."""
    bases = [w.operands if isinstance(w, NF4Weight) else (w, None, None, None, None, 0) for w in weights]
    tensors: list[Tensor] = []
    places: list[int | None] = []
    for tensor in (part for base in bases for part in base[:-1]):
        if tensor is None:
            places.append(None)
        elif len(places) > _NESTED_MAP and tensor is bases[0][_NESTED_MAP]:
            places.append(places[_NESTED_MAP])
        else:
            places.append(len(tensors))
            tensors.append(tensor)
    n, k = tuple(w.shape[0] for w in weights), weights[0].shape[1]
    constants = (tuple(places), tuple(base[-1] for base in bases), n, k, tuple(scales), p)
    return Layers(constants, (*tensors, *a, *b, *(None if bias is None else bias.to(dtype) for bias in biases)))


class LoRANode(torch.autograd.Function):
    """Differentiable in x, a, b and biases; ``given`` are outputs and xa that were computed before, or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor | None, given: Any, constants: Any, *tensors: Any) -> Any:
        """Give all outputs."""
        these = Layers(constants, tensors)
        if given is None:
            biases = these.split(tensors)[1][2]
            *ys, xa = torch.ops.fastpeft.lora_linear(x, *these.arguments(seed), biases)
        else:
            ys, xa = [y.detach() for y in given[0]], given[1]
        ctx.save_for_backward(x, xa, seed, *tensors)
        ctx.constants = constants
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients by x and the tensors."""
        x, xa, seed, *tensors = ctx.saved_tensors
        these = Layers(ctx.constants, tuple(tensors))
        want_dx, _, _, _, *wanted = ctx.needs_input_grad
        frozen, (want_a, want_b, want_bias) = these.split(wanted)
        dx, *factors = torch.ops.fastpeft.lora_linear_backward(
            list(dys), x, xa, *these.arguments(seed), want_dx, any(want_a) or any(want_b)
        )
        dab = [grad if want else None for grad, want in zip(factors, (*want_a, *want_b), strict=True)]
        dbias = [dy.reshape(-1, dy.shape[-1]).sum(0) if want else None for dy, want in zip(dys, want_bias, strict=True)]
        return dx if want_dx else None, None, None, None, *(None for _ in frozen), *dab, *dbias


# --- what users call ---
def _check(
    function: str,
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dropout: float,
) -> None:
    for w, down, up, bias in zip(weights, a, b, biases, strict=True):
        n, k = w.shape
        check_linear(function, x, n, k, w.device, bias)
        if down.dim() != 2 or up.dim() != 2 or down.shape[1] != k or up.shape[0] != n or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"{function}: a has shape {tuple(down.shape)} and b {tuple(up.shape)}; "
                f"a weight of ({n}, {k}) needs (r, {k}) and ({n}, r)"
            )
        if down.device != x.device or up.device != x.device:
            raise ValueError(
                f"{function}: x is on {x.device}, a on {down.device} and b on {up.device}; move them together"
            )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{function}: dropout is {dropout}; it must be at least 0 and below 1")


def lora_linear(
    x: Tensor,
    w: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Apply a frozen linear layer with a low-rank update: ``x @ w.T + scale * (drop(x) @ a.T) @ b.T + bias``.

    Differentiable in ``x``, ``a``, ``b`` and ``bias``; the base weight is frozen.

    Args:
        x: ``(..., k)``, float32, float16 or bfloat16; under autocast it is cast to autocast's dtype.
        w: ``(n, k)``, dense or NF4.
        a: ``(r, k)``, the down-projection; float32 under a 16-bit x is the usual case.
        b: ``(n, r)``, the up-projection.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        bias: ``(n,)`` of the base layer.
        dropout: probability that an element of x is left out of the low-rank path; the mask is made again in backward
            from a seed of torch's CPU generator.
        training: dropout is applied only when true.
    Returns:
        ``(..., n)``, dtype of ``x``; accumulated in float32.
    Raises:
        ValueError: shapes that do not fit, tensors on different devices, or a dropout outside [0, 1).
    Source:
        LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732.
    """
    _check("lora_linear", x, (w,), (a,), (b,), (bias,), dropout)
    return _apply(x, (w,), (a,), (b,), (scale,), (bias,), dropout if training else 0.0)[0]


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    adapters_a: Sequence[Tensor],
    adapters_b: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    training: bool = True,
) -> list[Tensor]:
    """Apply several LoRA linears to one x, such as a model's q, k and v: each as `lora_linear` does.

    x is read once for all adapters, with one dropout mask, and kept once for backward.

    Args:
        x: ``(..., k)``, float32, float16 or bfloat16; under autocast it is cast to autocast's dtype.
        weights: ``(n, k)`` each, dense or NF4, with an n of its own.
        adapters_a: ``(r, k)`` each.
        adapters_b: ``(n, r)`` each.
        scales: of each.
        biases: ``(n,)`` each or None; None where no layer has any.
        dropout: probability that an element of x is left out of the low-rank paths.
        training: dropout is applied only when true.
    Returns:
        ``(..., n)`` of each layer, dtype of ``x``; accumulated in float32.
    Raises:
        ValueError: lists of different lengths or empty ones, shapes that do not fit, tensors on different devices, or a
            dropout outside [0, 1).
    Source:
        LoRA, arXiv 2106.09685, section 4.1.
    """
    biases = [None] * len(weights) if biases is None else biases
    lengths = [len(values) for values in (weights, adapters_a, adapters_b, scales, biases)]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(
            "lora_linear_group: got {} weights, {} a, {} b, {} scales and {} biases; needs one of each for every "
            "layer, and at least one layer".format(*lengths)
        )
    _check("lora_linear_group", x, weights, adapters_a, adapters_b, biases, dropout)
    return _apply(x, weights, adapters_a, adapters_b, scales, biases, dropout if training else 0.0)


def _apply(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
    p: float,
) -> list[Tensor]:
    x = autocast(x)
    if p == 0.0 and lora_few.takes(x, a, b, biases):
        return lora_few.few(x, weights, a, b, scales, biases)
    these = layers(x.dtype, weights, a, b, scales, biases, p)
    seed = new_seed() if p > 0.0 else None
    return list(LoRANode.apply(x, seed, None, these.constants, *these.tensors))  # type: ignore[no-untyped-call]


def lora_linear_plan(x: Tensor, weights: Sequence[Tensor | NF4Weight], ranks: Sequence[int]) -> str:
    """Say in words how ``lora_linear_group(x, weights, ...)`` and its backward are computed, and why.

    Args:
        x: ``(..., k)``.
        weights: ``(n, k)`` each; a single one for `lora_linear`.
        ranks: of each layer's adapter.
    Returns:
        Such as ``fused: 3 adapters of 48 ranks in all`` or ``composed: a dense base``.
    """
    k = weights[0].shape[1]
    a = [x.new_empty((r, 0)) for r in ranks]
    these = layers(x.dtype, weights, a, a, [1.0] * len(ranks), [None] * len(ranks), 0.0)
    return lora_kernels.plan(_group(*these.arguments(None)), x.reshape(-1, k).contiguous()).reason
