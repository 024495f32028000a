"""Parameters, gradients and runs that the optimizer tests share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastpeft.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit

SHAPES = [(3,), (64, 48), (1,), (1000, 7), (5, 5, 5), (0,)]
BIG_SHAPES = [(300, 70), (5,), (4096,), (64, 65)]  # some above, some below the size from which state has 8 bits
FAMILY = [AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit]
Params = list[torch.nn.Parameter]


def parameters(
    device: str, dtype: torch.dtype = torch.float32, shapes: Iterable[Sequence[int]] = SHAPES, seed: int = 0
) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(*s, generator=generator).to(device, dtype)) for s in shapes]


def gradients(params: Params, step: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
    """Set the gradients of a step, the same ones for the same step."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = scale * torch.randn(param.shape, generator=generator)
        param.grad = grad.to(param.device, dtype or param.dtype)


def run(optimizer: torch.optim.Optimizer, params: Params, steps: Iterable[int], **options: Any) -> None:
    for step in steps:
        gradients(params, step, **options)
        optimizer.step()


def assert_same_bits(one: Params, other: Params) -> None:
    for place, (p, q) in enumerate(zip(one, other, strict=True)):
        differing = int((p.detach() != q.detach().to(p.device)).sum())
        assert differing == 0, f"parameter {place}: {differing} of {p.numel()} elements differ"
