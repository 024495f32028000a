"""Activations told by numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from fastpeft.nn.gated import find_activation, find_gate, gated

NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": None,
    "quick_gelu": None,
}


@pytest.mark.parametrize("name", list(NAMES))
def test_finds_transformers_activations(name: str) -> None:
    """GELU was taken for its approximation by a hyperbolic tangent: the tolerance was wider than their difference."""
    act = ACT2FN[name]

    def gate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        out: Tensor = act(first) * second
        return out

    assert find_activation(act) == find_gate(gate) == NAMES[name]
    if (found := NAMES[name]) is not None:
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(gated(x, None, found), gate(x))
        torch.testing.assert_close(gated(*x.chunk(2, -1), found), gate(x))


@pytest.mark.parametrize("limit", [3.0, 50.0])
def test_a_clamp_is_another_function(limit: float) -> None:
    act = ACT2FN["silu"]
    assert find_activation(lambda x: act(x.clamp(max=limit))) is None
    assert find_gate(lambda x: act(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1].clamp(-limit, limit)) is None
    assert find_gate(lambda x: x.chunk(2, -1)[0] * act(x.chunk(2, -1)[1])) is None
