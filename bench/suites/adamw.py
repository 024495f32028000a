"""One AdamW step: over one large tensor, bound by bandwidth, and over a model's LoRA tensors, bound by launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import reference
from bench.case import Calls, Case, Check, Inputs, Suite, Trial, Work
from bench.peers import bnb, torch_optim
from fastpeft.optim import AdamW

# Chosen so that each part of the formula weighs at least a tenth of the update: a decay left out must show.
_HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.5}
_PARAM_SCALE = 0.2
# Factors of the gradient in the checked steps: they differ, because with equal ones the moments hide their betas.
_CHECKED_STEPS = (1.0, -0.5, 2.0)
# bf16 rounds the parameters at every step, and torch rounds its state too.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
# bitsandbytes' CUDA kernel decays after the step instead of before: a difference of lr * weight_decay.
_BNB_TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 1e-1}
_CHUNK = 1 << 24
_EAGER = "an optimizer step is Python and kernels together, timed as a trainer calls it"

# (out_features, in_features) of the seven projections of a Llama-3-8B layer.
_LLAMA_8B = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
_TINY = ((64, 64), (16, 64), (16, 64), (64, 64), (224, 64), (224, 64), (64, 224))


def _lora_shapes(projections: Sequence[tuple[int, int]], layers: int, rank: int = 16) -> list[tuple[int, ...]]:
    """Shapes of the adapter tensors of a model: an ``a`` and a ``b`` for every projection of every layer."""
    shapes: list[tuple[int, ...]] = []
    for n, k in projections:
        shapes += [(rank, k), (n, rank)]
    return layers * shapes


def _update_error(start: Sequence[Tensor], grads: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Relative error of the change of all parameters over the checked steps, in float64, chunk by chunk."""
    wrong = reached = 0.0
    for p0, g, p in zip(start, grads, outputs, strict=True):
        chunks = (torch.split(tensor.flatten(), _CHUNK) for tensor in (p0, g, p.detach()))
        for p0_chunk, g_chunk, p_chunk in zip(*chunks, strict=True):
            steps = [g_chunk.double() * factor for factor in _CHECKED_STEPS]
            ref = reference.adamw(p0_chunk, steps, _HYPER["lr"], _HYPER["betas"], _HYPER["eps"], _HYPER["weight_decay"])
            wrong += float((p_chunk.double() - ref).square().sum())
            reached += float((ref - p0_chunk.double()).square().sum())
    return math.sqrt(wrong / reached)


def _contender(
    make: Callable[..., torch.optim.Optimizer], start: Sequence[Tensor], grads: Sequence[Tensor], note: str = ""
) -> Calls:
    """An optimizer over its own copy of the parameters; the gradients are shared, no optimizer writes them."""
    params = [nn.Parameter(p.clone()) for p in start]
    optimizer = make(params, **_HYPER)

    def checked_steps() -> list[Tensor]:
        for factor in _CHECKED_STEPS:
            for p, g in zip(params, grads, strict=True):
                p.grad = g * factor
            optimizer.step()
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return [p.detach() for p in params]

    return Calls([optimizer.step], outputs=checked_steps, eager_because=_EAGER, note=note)


def _prepare(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, inputs: Inputs) -> Trial:
    # One input set: it is read and written as a whole, and at full size is many times L2.
    start = [inputs.randn(*shape, dtype=dtype, scale=_PARAM_SCALE) for shape in shapes]
    grads = [inputs.randn(*shape, dtype=dtype) for shape in shapes]
    numel = sum(p.numel() for p in start)
    state_in_bf16 = "state in bf16, 14 bytes a parameter against 22" if dtype == torch.bfloat16 else ""

    def check(tolerances: dict[torch.dtype, float]) -> Check:
        return Check(partial(_update_error, start, grads), tolerances[dtype], "relative error of the update")

    return Trial(
        ours=_contender(AdamW, start, grads),
        peers={
            "torch": lambda: _contender(torch_optim.adamw, start, grads, note=state_in_bf16),
            "bnb": lambda: replace(_contender(bnb.adamw32bit, start, grads), check=check(_BNB_TOLERANCES)),
        },
        # Reads parameter, gradient and two fp32 moments; writes all but the gradient.
        work=Work(bytes=numel * (3 * dtype.itemsize + 16), memory="copy"),
        check=check(_TOLERANCES),
    )


def _cases(device_type: str) -> list[Case]:
    cuda = device_type == "cuda"
    tensors = [(1 << 26, torch.float32, True), (1 << 29, torch.float32, False), (1 << 29, torch.bfloat16, False)]
    if not cuda:
        tensors = [(1 << 20, torch.float32, True), (1 << 20, torch.bfloat16, True)]
    cases = [
        Case("adamw", {"tensors": 1, "params": f"{numel >> 20}M"}, dtype, partial(_prepare, [(numel,)], dtype), quick)
        for numel, dtype, quick in tensors
    ]
    lora = _lora_shapes(_LLAMA_8B, layers=32) if cuda else _lora_shapes(_TINY, layers=2)
    millions = sum(math.prod(shape) for shape in lora) / 1e6
    sizes: dict[str, int | float | str] = {"tensors": len(lora), "params": f"{millions:.3g}M", "r": 16}
    return [*cases, Case("adamw", sizes, torch.float32, partial(_prepare, lora, torch.float32), quick=True)]


SUITE = Suite("adamw", "one AdamW step with fp32 state", ("torch", "bnb"), _cases)
