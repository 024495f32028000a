"""Gated activations, on every device, against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import blocks
import pytest
import torch
from blocks import DTYPES, dtype_id
from tolerances import assert_exact
from torch import Tensor

from fastpeft import ops

KINDS: dict[str, Callable[..., Tensor]] = {
    "swiglu": ops.swiglu,
    "geglu-tanh": ops.geglu,
    "geglu-none": lambda *halves: ops.geglu(*halves, approximate="none"),
}
# name: shape; what each is there for
SHAPES = {
    "one": (1,),
    "odd": (3, 5, 7),
    "packs": (2, 3, 64),
    "more-than-a-block": (3, 5000),
    "llama": (2, 14336),
    "many-rows": (700, 24),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, count: int = 2) -> list[Tensor]:
    """Gates up to twelve in magnitude, where the activations have gone flat."""
    return [(3 * torch.randn(shape, device=device)).to(dtype).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward_and_backward(dtype: torch.dtype, kind: str, shape: tuple[int, ...], device: str) -> None:
    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return blocks.glu(kind, gate, up)

    blocks.compare(KINDS[kind], plain, inputs(shape, dtype, device))


@pytest.mark.parametrize("width", [64, 50, 14336, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_halves_of_one_tensor(kind: str, width: int, device: str) -> None:
    """Whole, chunked and copied apart they give the same bits, and so do their gradients."""
    (joint,) = inputs((2, 3, 2 * width), torch.bfloat16, device, count=1)
    dy = torch.randn(2, 3, width, device=device).bfloat16()
    results = []
    for halves in ([joint], joint.chunk(2, -1), [half.contiguous() for half in joint.chunk(2, -1)]):
        out = KINDS[kind](*halves)
        results.append((out, torch.autograd.grad(out, joint, dy)[0]))
    for out, grad in results[:2]:
        assert_exact(out, results[2][0])
        assert_exact(grad, results[2][1])


def test_far_from_zero(device: str) -> None:
    """No NaN where exponentials overflow; large negative gates give zero, large positive ones pass."""
    for dtype in DTYPES:
        gate = torch.tensor([-60000.0, -200.0, -90.0, 0.0, 90.0, 200.0], device=device, dtype=dtype, requires_grad=True)
        for kind, function in KINDS.items():
            out = function(gate, torch.ones_like(gate))
            (grad,) = torch.autograd.grad(out.sum(), gate)
            expected = blocks.glu(kind, gate.double(), torch.ones_like(gate).double())
            torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
            assert bool(grad.isfinite().all()), (kind, dtype, grad)
            assert grad[[0, 1, 4, 5]].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_by_hand(device: str) -> None:
    """silu(0) = 0 with slope 1/2: with up 3 and dy 2, dgate = 3 and dup = 0."""
    gate, up = (torch.tensor([value], device=device, requires_grad=True) for value in (0.0, 3.0))
    out = ops.swiglu(gate, up)
    grads = torch.autograd.grad(out, [gate, up], torch.tensor([2.0], device=device))
    assert [out.item(), *(grad.item() for grad in grads)] == [0.0, 3.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    gate, up = inputs((3, 10), torch.float64, "cpu")
    assert torch.autograd.gradcheck(KINDS[kind], (gate, up))
    assert torch.autograd.gradcheck(KINDS[kind], (gate,))


@pytest.mark.parametrize("joint", [False, True], ids=["two", "joint"])
def test_registration_and_compile(joint: bool, device: str) -> None:
    gate, up = inputs((3, 10), torch.float32, device)
    dy = torch.randn(3, 5 if joint else 10, device=device)
    halves = [gate] if joint else [gate, up]
    arguments: tuple[Any, ...] = (gate.detach(), None if joint else up.detach())
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fastpeft.glu.default, (*arguments, 0), test_utils=utils)
    torch.library.opcheck(torch.ops.fastpeft.glu_backward.default, (dy, *arguments, 0), test_utils=utils)

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(*halves)
        return [out, *torch.autograd.grad(out, halves, dy)]

    compiled = torch.compile(ops.swiglu, backend="aot_eager", fullgraph=True)
    for value, reference in zip(gradients(compiled), gradients(ops.swiglu), strict=True):
        assert_exact(value, reference)


def test_what_does_not_fit_is_refused() -> None:
    gate = torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"swiglu: gate has shape \(3, 5\); without up, its last size must be even"):
        ops.swiglu(gate)
    with pytest.raises(ValueError, match=r"geglu: gate is \(3, 5\), torch.float32 on cpu and up \(3, 4\)"):
        ops.geglu(gate, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"swiglu: .* must be alike"):
        ops.swiglu(gate, gate.half())
    with pytest.raises(ValueError, match="geglu: approximate is 'erf'; it must be 'tanh' or 'none'"):
        ops.geglu(gate, gate, approximate="erf")
    with pytest.raises(ValueError, match=r"glu: dtype torch\.int64 is not supported"):
        ops.swiglu(gate.long(), gate.long())
