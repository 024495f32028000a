"""Rotary embedding of q and k, on every device, against the formula of transformers in float64."""

from __future__ import annotations

import math

import blocks
import pytest
import torch
from blocks import DTYPES, dtype_id
from tolerances import assert_exact
from torch import Tensor

from fastpeft import ops

# name: (b, q heads, k heads, t, d, rotary); what each is there for
SHAPES = {
    "llama": (2, 32, 8, 17, 128, 128),
    "smollm": (1, 9, 3, 33, 64, 64),
    "heads-of-256": (1, 4, 1, 5, 256, 256),
    "partial-phi3": (2, 6, 2, 7, 96, 72),
    "partial-packs": (1, 5, 5, 9, 96, 64),
    "partial-one-pack-left": (1, 3, 1, 4, 72, 64),
    "odd-half": (1, 3, 2, 6, 20, 14),
    "nothing-rotates": (1, 2, 1, 3, 16, 0),
    "one-token": (3, 8, 2, 1, 64, 64),
    "many-heads": (1, 70, 3, 2, 128, 128),
}


def angles(b: int, t: int, rotary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Independent halves, which no model has, so that taking one for the other shows."""
    phase = torch.rand(b, t, rotary, device=device) * 2 * math.pi
    return phase.cos().to(dtype), phase.sin().to(dtype)


def views(b: int, heads: int, t: int, d: int, dtype: torch.dtype, device: str, layout: str) -> Tensor:
    """``(b, heads, t, d)`` as it lies in memory: dense, a view of a projection, or a part of a joint projection."""
    if layout == "dense":
        return torch.randn(b, heads, t, d, device=device).to(dtype)
    extra = 8 if layout == "joint" else 0
    return (
        torch.randn(b, t, heads * d + extra, device=device).to(dtype)[..., extra:].view(b, t, heads, d).transpose(1, 2)
    )


@pytest.mark.parametrize("layout", ["dense", "view", "joint"])
@pytest.mark.parametrize("float_angles", [False, True], ids=["angles-alike", "angles-fp32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward_and_backward(
    dtype: torch.dtype, shape: tuple[int, ...], float_angles: bool, layout: str, device: str
) -> None:
    b, q_heads, k_heads, t, d, rotary = shape
    q = views(b, q_heads, t, d, dtype, device, layout).requires_grad_()
    k = views(b, k_heads, t, d, dtype, device, layout).requires_grad_()
    cos, sin = angles(b if layout == "view" else 1, t, rotary, torch.float32 if float_angles else dtype, device)

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        of = (cos.to(q.dtype), sin.to(q.dtype))
        return blocks.rotate(q, *of), blocks.rotate(k, *of)

    def exact(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return blocks.rotate(q, cos.double(), sin.double()), blocks.rotate(k, cos.double(), sin.double())

    blocks.compare(lambda q, k: ops.rope(q, k, cos, sin), plain, [q, k], exact)


@pytest.mark.parametrize("layout", ["dense", "view"])
def test_results_and_gradients_lie_as_the_inputs_do(layout: str, device: str) -> None:
    q = views(2, 4, 5, 64, torch.float32, device, layout).requires_grad_()
    k = views(2, 2, 5, 64, torch.float32, device, layout).requires_grad_()
    outs = ops.rope(q, k, *angles(1, 5, 64, torch.float32, device))
    grads = torch.autograd.grad(outs, [q, k], [torch.randn(out.shape, device=device) for out in outs])
    for x, out, grad in zip((q, k), outs, grads, strict=True):
        assert out.stride() == x.stride()
        assert grad.stride() == x.stride()


def test_results_can_be_changed_in_place(device: str) -> None:
    """They were views once, made by a transpose inside the op, and autograd refused."""
    q = views(1, 4, 5, 16, torch.float32, device, "view").requires_grad_()
    cos, sin = angles(1, 5, 16, torch.float32, device)
    scaled, _ = ops.rope(q, q, cos, sin)
    scaled.mul_(2.0)
    (grad,) = torch.autograd.grad(scaled.sum(), q)
    (expected,) = torch.autograd.grad(2.0 * ops.rope(q, q, cos, sin)[0].sum(), q)
    assert_exact(grad, expected)


def test_gradients_that_are_expanded(device: str) -> None:
    """A sum's gradient has stride 0 and is copied; the copy was once freed before the kernel read it."""
    q, k = (views(2, heads, 65, 64, torch.float32, device, "dense").requires_grad_() for heads in (4, 2))
    cos, sin = angles(1, 65, 64, torch.float32, device)
    outs = ops.rope(q, k, cos, sin)
    expected = torch.autograd.grad(outs, [q, k], [torch.ones_like(out) for out in outs], retain_graph=True)
    got = torch.autograd.grad([out.sum() for out in outs], [q, k])
    for value, reference in zip(got, expected, strict=True):
        assert_exact(value, reference)


def test_backward_turns_back(device: str) -> None:
    """With equal halves the map is a rotation: its gradient is its inverse, and lengths stay."""
    q, k = (torch.randn(1, heads, 9, 64, device=device, requires_grad=True) for heads in (4, 2))
    phase = torch.rand(1, 9, 32, device=device).repeat(1, 1, 2) * 6
    outs = ops.rope(q, k, phase.cos(), phase.sin())
    back = torch.autograd.grad(outs, [q, k], [out.detach() for out in outs])
    for x, out, returned in zip((q, k), outs, back, strict=True):
        torch.testing.assert_close(returned, x.detach())
        torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_a_quarter_turn_by_hand(device: str) -> None:
    """(1, 2, 3, 4) has the pairs (1, 3) and (2, 4); a quarter turn makes them (-3, 1) and (-4, 2)."""
    q = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 1, 4, device=device), torch.ones(1, 1, 4, device=device)
    assert ops.rope(q, q, cos, sin)[0].flatten().tolist() == [-3.0, -4.0, 1.0, 2.0]


def test_as_transformers(device: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    q, k = (torch.randn(2, heads, 11, 64, device=device) for heads in (4, 2))
    phase = torch.rand(2, 11, 32, device=device).repeat(1, 1, 2) * 6
    ours = ops.rope(q, k, phase.cos(), phase.sin())
    for out, expected in zip(ours, llama.apply_rotary_pos_emb(q, k, phase.cos(), phase.sin()), strict=True):
        torch.testing.assert_close(out, expected)


def test_gradcheck() -> None:
    q, k = (torch.randn(2, 7, heads, 12, dtype=torch.float64, requires_grad=True) for heads in (3, 2))
    cos, sin = (torch.randn(2, 7, 8, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: ops.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin), (q, k))


@pytest.mark.parametrize("layout", ["dense", "view"])
def test_registration_and_compile(layout: str, device: str) -> None:
    q, k = (views(2, heads, 5, 16, torch.float32, device, layout) for heads in (4, 2))
    cos, sin = angles(1, 5, 16, torch.float32, device)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for inside in (False, True):
        arguments = (q, k, cos, sin, inside, inside, inside)
        torch.library.opcheck(torch.ops.fastpeft.rope.default, arguments, test_utils=utils)
    q.requires_grad_(), k.requires_grad_()

    def gradients(function: object) -> list[Tensor]:
        outs = function(q, k, cos, sin)  # type: ignore[operator]
        return [*outs, *torch.autograd.grad([out.square().sum() for out in outs], [q, k])]

    compiled = torch.compile(ops.rope, backend="aot_eager", fullgraph=True)
    for value, reference in zip(gradients(compiled), gradients(ops.rope), strict=True):
        assert_exact(value, reference)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.ones(1, 2, 5, 8)}, r"q has shape \(1, 4, 3, 8\) and k \(1, 2, 5, 8\)"),
        ({"cos": torch.ones(1, 4, 8)}, r"both must be \(1 or 1, 3, rotary\)"),
        ({"cos": torch.ones(1, 3, 10), "sin": torch.ones(1, 3, 10)}, "cos has 10 columns; it must be .* at most 8"),
        ({"cos": torch.ones(1, 3, 5), "sin": torch.ones(1, 3, 5)}, "cos has 5 columns; it must be an even number"),
        ({"k": torch.ones(1, 2, 3, 8).half()}, "must have one dtype"),
    ],
    ids=["tokens", "angles", "wide", "odd", "dtype"],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Tensor], message: str) -> None:
    arguments = {
        "q": torch.ones(1, 4, 3, 8),
        "k": torch.ones(1, 2, 3, 8),
        "cos": torch.ones(1, 3, 8),
        "sin": torch.ones(1, 3, 8),
    }
    with pytest.raises(ValueError, match=f"rope: .*{message}"):
        ops.rope(**{**arguments, **changed})
