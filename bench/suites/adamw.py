"""One AdamW step: over one large tensor, bound by bandwidth, and over a model's LoRA tensors, bound by launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import reference
from bench.case import Calls, Case, Check, Inputs, Suite, Trial, Work
from bench.peers import bnb, torch_optim
from fastpeft.optim import AdamW, AdamW8bit

# Chosen so that each part of the formula weighs at least a tenth of the update: a decay left out must show.
_HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.5}
PARAM_SCALE = 0.2
# Factors of the gradient in the checked steps: they differ, because with equal ones the moments hide their betas.
_CHECKED_STEPS = (1.0, -0.5, 2.0)
# bf16 rounds the parameters at every step, and torch rounds its state too.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
# bitsandbytes' CUDA kernel decays after the step instead of before: a difference of lr * weight_decay.
BNB_TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 1e-1}
EIGHT_BIT_TOLERANCE = 1e-1  # the state is rounded to 8 bits at each step
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


def update_error(start: Sequence[Tensor], grads: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
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


def contender(
    make: Callable[..., torch.optim.Optimizer],
    start: Sequence[Tensor],
    grads: Sequence[Tensor],
    note: str = "",
    eager_because: str = _EAGER,
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

    return Calls([optimizer.step], outputs=checked_steps, eager_because=eager_because, note=note)


@dataclass(frozen=True)
class _Kind:
    """Which optimizer, and what its peers are.

    Attributes:
        ours: makes fastpeft's.
        peers: make theirs.
        state_bytes: of the moments of a parameter, read and written.
        tolerance: of every contender, in place of the dtype's; state of 8 bits is rounded at each step.
    """

    ours: Callable[..., torch.optim.Optimizer]
    peers: Mapping[str, Callable[..., torch.optim.Optimizer]]
    state_bytes: float
    tolerance: float | None = None


FLOAT32 = _Kind(AdamW, {"torch": torch_optim.adamw, "bnb": bnb.adamw("AdamW32bit")}, 8)
# Of the rows of many small tensors: what bitsandbytes offers for adapters.
MANY = replace(FLOAT32, peers={**FLOAT32.peers, "bnb": bnb.adamw("PagedAdamW32bit")})
GRAPH = replace(MANY, peers={**MANY.peers, "torch": torch_optim.adamw_for_graphs})
EIGHT_BIT = _Kind(
    AdamW8bit,
    {**FLOAT32.peers, "bnb": bnb.adamw("AdamW8bit")},
    state_bytes=2 + 8 / 256,
    tolerance=EIGHT_BIT_TOLERANCE,
)


def _prepare(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    inputs: Inputs,
    kind: _Kind = FLOAT32,
    eager_because: str = _EAGER,
) -> Trial:
    # One input set: it is read and written as a whole, and at full size is many times L2.
    start = [inputs.randn(*shape, dtype=dtype, scale=PARAM_SCALE) for shape in shapes]
    grads = [inputs.randn(*shape, dtype=dtype) for shape in shapes]
    numel = sum(p.numel() for p in start)
    each = 3 * dtype.itemsize + 2 * kind.state_bytes
    state_in_bf16 = f"state in bf16, 14 bytes a parameter against {each:.0f}" if dtype == torch.bfloat16 else ""

    def check(tolerances: dict[torch.dtype, float]) -> Check:
        tolerance = tolerances[dtype] if kind.tolerance is None else kind.tolerance
        return Check(partial(update_error, start, grads), tolerance, "relative error of the update")

    def peer(name: str) -> Calls:
        note = state_in_bf16 if name == "torch" else "its paged optimizer" if kind in (MANY, GRAPH) else ""
        calls = contender(kind.peers[name], start, grads, note, eager_because)
        return replace(calls, check=check(BNB_TOLERANCES)) if name == "bnb" else calls

    return Trial(
        ours=contender(kind.ours, start, grads, eager_because=eager_because),
        peers={name: partial(peer, name) for name in kind.peers},
        # Reads parameter, gradient and moments; writes all but the gradient.
        work=Work(bytes=round(numel * each), memory="copy"),
        check=check(_TOLERANCES),
    )


def _cases(device_type: str) -> list[Case]:
    cuda = device_type == "cuda"
    tensors = [(1 << 26, torch.float32, True), (1 << 29, torch.float32, False), (1 << 29, torch.bfloat16, False)]
    eight_bit = [(1 << 26, torch.bfloat16, True), (1 << 29, torch.bfloat16, False)]
    if not cuda:
        tensors = [(1 << 20, torch.float32, True), (1 << 20, torch.bfloat16, True)]
        eight_bit = [(1 << 20, torch.bfloat16, True)]
    cases = []
    for op, kind, sizes_of in (("adamw", FLOAT32, tensors), ("adamw8bit", EIGHT_BIT, eight_bit)):
        for numel, dtype, quick in sizes_of:
            sizes: dict[str, int | float | str] = {"tensors": 1, "params": f"{numel >> 20}M"}
            cases.append(Case(op, sizes, dtype, partial(_prepare, [(numel,)], dtype, kind=kind), quick))
    lora = _lora_shapes(_LLAMA_8B, layers=32) if cuda else _lora_shapes(_TINY, layers=2)
    millions = sum(math.prod(shape) for shape in lora) / 1e6
    sizes = {"tensors": len(lora), "params": f"{millions:.3g}M", "r": 16}
    cases.append(Case("adamw", sizes, torch.float32, partial(_prepare, lora, torch.float32, kind=MANY), quick=True))
    if cuda:
        captured = partial(_prepare, lora, torch.float32, kind=GRAPH, eager_because="")
        cases.append(Case("adamw_graph", sizes, torch.float32, captured, quick=True))
    return cases


SUITE = Suite("adamw", "one AdamW step with its state on the device", ("torch", "bnb"), _cases)
