"""The gated activation that writes its gradients over its inputs gives the gradients of the one that does not."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_exact

from fastpeft.ops import geglu, swiglu
from fastpeft.ops.glu import glu_consuming

_PLAIN = {
    "silu": swiglu,
    "gelu_tanh": geglu,
    "gelu": lambda gate, up: geglu(gate, up, approximate="none"),
}


@pytest.mark.parametrize("shape", [(3, 40), (2, 17, 130), (5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("halves", [False, True], ids=["two", "halves"])
@pytest.mark.parametrize("activation", _PLAIN)
def test_gradients(activation: str, halves: bool, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    width = shape[-1] * 2 if halves else shape[-1]
    leaf = torch.randn(*shape[:-1], width, device=device, dtype=dtype)
    other = None if halves else torch.randn(shape, device=device, dtype=dtype)
    dy = torch.randn(shape, device=device, dtype=dtype)

    def run(function: object) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (leaf, other) if t is not None]
        inputs = [leaf * 1 for leaf in leaves]  # no leaves: they are written over
        out = function(inputs[0], inputs[1] if len(inputs) == 2 else None)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, leaves, dy)]

    for one, plain in zip(run(lambda g, u: glu_consuming(g, u, activation)), run(_PLAIN[activation]), strict=True):
        assert_exact(one, plain)


def test_inputs_with_gaps_are_left_alone() -> None:
    wide = torch.randn(4, 20)
    gate, up = wide[:, :8], wide[:, 10:18]
    before = wide.clone()
    leaf = gate.requires_grad_()
    glu_consuming(leaf * 1, up, "silu").sum().backward()
    glu_consuming(gate.detach().requires_grad_(), up, "silu").sum().backward()
    assert_exact(wide.detach(), before)
