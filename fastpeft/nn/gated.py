"""Gated activations ``act(gate) * up`` of other libraries' modules, told by numbers and computed by one op."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops import geglu, swiglu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}
_TOLERANCE = 1e-6  # GELU and its approximation differ by 7e-5
_SPANS = (4.0, 400.0)  # of inputs: where activations differ, and where values are clamped


def find_activation(act: Callable[[Tensor], Tensor]) -> str | None:
    """Which of `ACTIVATIONS` a function is; None for another one.

    Args:
        act: the function, or a module without weights.
    """
    return _find(act, lambda known, x: known(x))


def find_gate(gate: Callable[[Tensor], Tensor]) -> str | None:
    """Which of `ACTIVATIONS` a function of both halves in one tensor multiplies by; None where it does another thing.

    Args:
        gate: ``(..., 2 * width)`` to ``(..., width)``.
    """
    return _find(gate, lambda known, x: known(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1])


@torch.no_grad()
def _find(own: Callable[[Tensor], Tensor], like: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> str | None:
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(64, 16, generator=generator, dtype=torch.float32, device="cpu")
    for name, known in ACTIVATIONS.items():
        if all(agree(like(known, span * x), own(span * x), _TOLERANCE) for span in _SPANS):
            return name
    return None


def agree(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether the relative difference of two tensors, by their norms, is within a tolerance."""
    return one.shape == other.shape and bool((one - other).norm() <= tolerance * other.norm())


def gated(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """``act(gate) * up``.

    Args:
        gate: ``(..., width)``; without ``up``, ``(..., 2 * width)``: gate, then up.
        up: shape and dtype of ``gate``.
        activation: a key of `ACTIVATIONS`.
    Returns:
        ``(..., width)``.
    """
    if activation == "silu":
        return swiglu(gate, up)
    return geglu(gate, up, "tanh" if activation == "gelu_tanh" else "none")
