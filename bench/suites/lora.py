"""LoRA linears over frozen NF4 bases, forward and backward: the layers that fine-tuning spends its time in.

``lora`` is one of them, ``lora_group`` those that share an x: q, k and v, or gate and up.

fastpeft trains fp32 adapters. ``dense`` and ``bnb`` are the frozen base alone (forward and gradient by the input),
the floor of what an adapter can cost, and of a group one wide product; ``peft`` has its adapters cast to bf16,
``peft-fp32`` runs fp32 adapters under bf16 autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench import reference
from bench.case import Calls, Case, Check, Inputs, Suite, Trial, Work
from bench.peers import bnb, dense, peft
from bench.timing import forward_backward
from fastpeft.ops import lora_linear, lora_linear_group, nf4_quantize

_SHAPES = {"cuda": ((4096, 4096), (14336, 4096), (4096, 14336)), "cpu": ((256, 512),)}
_GROUPS = {"cuda": (((4096, 1024, 1024), 4096), ((14336, 14336), 4096)), "cpu": (((256, 128), 512),)}
_TOKENS = {"cuda": (2048, 8192), "cpu": (256,)}
_RANKS = {"cuda": (16, 64), "cpu": (16,)}
_DROPOUTS = (0.0, 0.05)
_QUICK = {(4096, 4096, 2048, 16), (14336, 4096, 8192, 16), (256, 512, 256, 16)}
_SCALE = 2.0
_TOLERANCE = 2e-2
# The measured noise of a small random sample scatters by a few percent; no dropout, or twice it, is off by 40% or more.
_DROPOUT_TOLERANCE = 0.2


def _reference(
    x: Tensor, w: Tensor, dy: Tensor, a: Tensor, b: Tensor, adapter: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Output and gradients without dropout in float64, each with the adapter's share of it.

    Returns:
        Pairs for the output, the gradient by the input and, with ``adapter``, by ``a`` and ``b``; without ``adapter``
        the frozen base alone, whose shares are zero.
    """
    x, w, dy, a, b = (tensor.detach().double() for tensor in (x, w, dy, a, b))
    if not adapter:
        return [(out, torch.zeros_like(out)) for out in (x @ w.T, dy @ w)]
    hidden, dhidden = x @ a.T, _SCALE * (dy @ b)
    y_share, dx_share = _SCALE * (hidden @ b.T), dhidden @ a
    da, db = dhidden.T @ x, _SCALE * (dy.T @ hidden)
    return [(x @ w.T + y_share, y_share), (dy @ w + dx_share, dx_share), (da, da), (db, db)]


def _check(pairs: Callable[[], Sequence[tuple[Tensor, Tensor]]], dropout: float) -> Check:
    if dropout:
        return reference.dropout_noise(pairs, dropout, _DROPOUT_TOLERANCE)
    return reference.close_to(lambda: [whole for whole, _ in pairs()], _TOLERANCE)


def _prepare(m: int, n: int, k: int, rank: int, dropout: float, inputs: Inputs) -> Trial:
    io_bytes = 2 * 2 * m * (n + k)
    sets = inputs.sets(n * k // 2 + io_bytes)
    ws = [inputs.randn(n, k, scale=k**-0.5) for _ in range(sets)]
    packed = [nf4_quantize(w) for w in ws]
    # The dense peer gets the decoded weight, so that all contenders have the same base.
    decoded = [reference.nf4_decode(w).to(torch.bfloat16) for w in packed]
    xs = [inputs.randn(m, k).requires_grad_() for _ in range(sets)]
    dys = [inputs.randn(m, n, scale=n**-0.5 * k**0.5) for _ in range(sets)]
    a = inputs.randn(rank, k, dtype=torch.float32, scale=k**-0.5).requires_grad_()
    b = inputs.randn(n, rank, dtype=torch.float32, scale=rank**-0.5).requires_grad_()

    def ours(x: Tensor, index: int) -> Callable[[], list[Tensor]]:
        forward = partial(lora_linear, x, packed[index], a, b, _SCALE, dropout=dropout)
        return forward_backward(forward, [x, a, b], dys[index])

    def peft_step(adapter_dtype: torch.dtype) -> Calls:
        adapter = (a.detach().to(adapter_dtype), b.detach().to(adapter_dtype))
        return peft.lora_step(xs, ws, dys, *adapter, _SCALE, dropout, autocast=adapter_dtype == torch.float32)

    frozen = _check(lambda: _reference(xs[0], decoded[0], dys[0], a, b, adapter=False), dropout=0.0)
    return Trial(
        ours=Calls([ours(x, index) for index, x in enumerate(xs)]),
        peers={
            "dense": lambda: replace(dense.frozen_step(xs, decoded, dys), check=frozen, note="frozen base alone"),
            "bnb": lambda: replace(bnb.frozen_step(xs, ws, dys), check=frozen, note="frozen base alone"),
            "peft": lambda: peft_step(torch.bfloat16),
            "peft-fp32": lambda: peft_step(torch.float32),
        },
        work=Work(
            bytes=packed[0].nbytes + io_bytes + 2 * 4 * rank * (n + k),
            flops=4 * m * n * k + 6 * m * rank * (n + k),
            memory="copy",
        ),
        check=_check(lambda: _reference(xs[0], decoded[0], dys[0], a, b), dropout),
    )


def _prepare_group(m: int, ns: tuple[int, ...], k: int, rank: int, dropout: float, inputs: Inputs) -> Trial:
    n, count = sum(ns), len(ns)
    io_bytes = 2 * 2 * m * (n + k)
    sets = inputs.sets(n * k // 2 + io_bytes)
    ws = [inputs.randn(n, k, scale=k**-0.5) for _ in range(sets)]
    packed = [[nf4_quantize(part) for part in w.split(ns)] for w in ws]
    decoded = [torch.cat([reference.nf4_decode(part).to(torch.bfloat16) for part in parts]) for parts in packed]
    xs = [inputs.randn(m, k).requires_grad_() for _ in range(sets)]
    dys = [[inputs.randn(m, width, scale=n**-0.5 * k**0.5) for width in ns] for _ in range(sets)]
    a = [inputs.randn(rank, k, dtype=torch.float32, scale=k**-0.5).requires_grad_() for _ in ns]
    b = [inputs.randn(width, rank, dtype=torch.float32, scale=rank**-0.5).requires_grad_() for width in ns]
    wide = [torch.cat(parts, 1) for parts in dys]

    def ours(x: Tensor, index: int) -> list[Tensor]:
        ys = lora_linear_group(x, packed[index], a, b, [_SCALE] * count, dropout=dropout)
        return [*ys, *torch.autograd.grad(ys, [x, *a, *b], dys[index])]

    def peft_step(adapter_dtype: torch.dtype) -> Calls:
        layers = [
            peft.lora_step(
                xs,
                [w.split(ns)[i] for w in ws],
                [parts[i] for parts in dys],
                a[i].detach().to(adapter_dtype),
                b[i].detach().to(adapter_dtype),
                _SCALE,
                dropout,
                autocast=adapter_dtype == torch.float32,
            )
            for i in range(count)
        ]
        calls = [partial(_joined, steps) for steps in zip(*(layer.calls for layer in layers), strict=True)]
        return replace(layers[0], calls=calls)

    def pairs() -> list[tuple[Tensor, Tensor]]:
        each = [
            _reference(xs[0], w, dy, down, up)
            for w, dy, down, up in zip(decoded[0].split(ns), dys[0], a, b, strict=True)
        ]
        ys, dxs, das, dbs = zip(*each, strict=True)
        whole, share = (torch.stack(part).sum(0) for part in zip(*dxs, strict=True))
        return [*ys, (whole, share), *das, *dbs]

    frozen = _check(lambda: _reference(xs[0], decoded[0], wide[0], a[0], b[0], adapter=False), dropout=0.0)
    return Trial(
        ours=Calls([partial(ours, x, index) for index, x in enumerate(xs)]),
        peers={
            "dense": lambda: replace(dense.frozen_step(xs, decoded, wide), check=frozen, note="frozen base alone"),
            "bnb": lambda: replace(bnb.frozen_step(xs, ws, wide), check=frozen, note="frozen base alone"),
            "peft": lambda: peft_step(torch.bfloat16),
            "peft-fp32": lambda: peft_step(torch.float32),
        },
        work=Work(
            bytes=sum(part.nbytes for part in packed[0]) + io_bytes + 2 * 4 * rank * (n + count * k),
            flops=4 * m * n * k + 6 * m * rank * (n + count * k),
            memory="copy",
        ),
        check=_check(pairs, dropout),
    )


def _joined(steps: Sequence[Callable[[], list[Tensor]]]) -> list[Tensor]:
    """Layers of one x, one after another: all outputs, the sum of the gradients by x, and the others."""
    ys, dxs, das, dbs = zip(*(step() for step in steps), strict=True)
    dx = dxs[0]
    for other in dxs[1:]:
        dx = dx + other
    return [*ys, dx, *das, *dbs]


def _cases(device_type: str) -> list[Case]:
    return [
        Case(
            "lora",
            {"m": m, "n": n, "k": k, "r": rank, "dropout": dropout},
            torch.bfloat16,
            partial(_prepare, m, n, k, rank, dropout),
            quick=(n, k, m, rank) in _QUICK,
        )
        for n, k in _SHAPES[device_type]
        for m in _TOKENS[device_type]
        for rank in _RANKS[device_type]
        for dropout in _DROPOUTS
    ] + [
        Case(
            "lora_group",
            {"m": m, "n": "+".join(map(str, ns)), "k": k, "r": rank, "dropout": dropout},
            torch.bfloat16,
            partial(_prepare_group, m, ns, k, rank, dropout),
        )
        for ns, k in _GROUPS[device_type]
        for m in _TOKENS[device_type][-1:]
        for rank in _RANKS[device_type]
        for dropout in _DROPOUTS
    ]


SUITE = Suite(
    "lora",
    "LoRA linears over NF4 bases, forward and backward (dense, bnb: the frozen base alone)",
    ("dense", "bnb", "peft", "peft-fp32"),
    _cases,
)
