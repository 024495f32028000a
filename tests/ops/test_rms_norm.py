"""RMSNorm with the residual add, on every device, against the formula of transformers in float64."""

from __future__ import annotations

import blocks
import pytest
import torch
from blocks import DTYPES, dtype_id
from tolerances import assert_exact
from torch import Tensor

from fastpeft import ops
from fastpeft.ops import native

# name: shape; what each is there for
SHAPES = {
    "one-row": (1, 4096),
    "rows-share-a-warp": (2, 5, 3, 128),
    "heads-of-64": (3, 7, 9, 64),
    "heads-of-80": (11, 80),
    "widest-shared": (13, 256),
    "one-pack": (19, 8),
    "narrowest-block": (5, 264),
    "heads-of-512": (3, 512),
    "one-warp-masked": (5, 576),
    "smollm": (2, 9, 960),
    "llama": (3, 7, 2048),
    "ragged-block": (2, 3584),
    "odd-width": (9, 77),
    "three-columns": (40, 3),
}
# -rows: more than the blocks that stay resident for dweight have at a time
LARGE = {
    "w128-rows": (40_000, 128),
    "w4096-rows": (1500, 4096),
    "w8192-rows": (700, 8192),
    "w16384-rows": (300, 16384),
    "w20000": (3, 20000),
}
KINDS = {"llama": (0.0, True), "gemma": (1.0, False)}


def check(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    kind: str,
    with_residual: bool,
    train_weight: bool,
    device: str,
) -> None:
    offset, cast_first = KINDS[kind]
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    residual = torch.randn(shape, device=device).to(dtype).requires_grad_()
    weight = (1 - offset + torch.randn(shape[-1], device=device) / 4).to(weight_dtype).requires_grad_(train_weight)

    def ours(x: Tensor, weight: Tensor, *residual: Tensor) -> object:
        added = residual[0] if residual else None
        return ops.rms_norm(x, weight, 1e-5, offset=offset, cast_first=cast_first, residual=added)

    def plain(x: Tensor, weight: Tensor, *residual: Tensor) -> object:
        h = x + residual[0] if residual else x
        y = blocks.rms_norm(h, weight, 1e-5, offset, cast_first)
        return (y, h) if residual else y

    blocks.compare(ours, plain, [x, weight, residual] if with_residual else [x, weight])


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward_and_backward(
    dtype: torch.dtype, shape: tuple[int, ...], kind: str, with_residual: bool, device: str
) -> None:
    check(shape, dtype, dtype, kind, with_residual, True, device)


@pytest.mark.gpu
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("train_weight", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_large_forward_and_backward(
    dtype: torch.dtype, shape: tuple[int, ...], train_weight: bool, with_residual: bool
) -> None:
    check(shape, dtype, dtype, "llama", with_residual, train_weight, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (65_536, 128)], ids=["wide", "shared"])
def test_norms_right_behind_each_other(shape: tuple[int, ...]) -> None:
    """Each asks L2 for its input while the norm that writes it still runs, into memory that held another's."""
    start, residual = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(shape[-1], device="cuda", dtype=torch.bfloat16)

    def chain(wait: bool) -> Tensor:
        x = start
        for _ in range(20):
            _, h = ops.rms_norm(x, weight, residual=residual)
            if wait:
                torch.cuda.synchronize()
            x = ops.rms_norm(h, weight)
            if wait:
                torch.cuda.synchronize()
        return x

    assert_exact(chain(wait=False), chain(wait=True))


@pytest.mark.parametrize("train_weight", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", [(6, 128), (3, 1024), (3, 33)], ids=["shared", "wide", "general"])
def test_float32_weight_of_a_16_bit_model(shape: tuple[int, ...], train_weight: bool, device: str) -> None:
    check(shape, torch.bfloat16, torch.float32, "gemma", True, train_weight, device)


@pytest.mark.parametrize("width", [128, 1024, 33])
def test_rows_that_lie_apart(width: int, device: str) -> None:
    x = torch.randn(6, 2 * width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(width, device=device, dtype=torch.bfloat16)
    for part in (x[:, :width], x[:, width:], x[::2, :width], x.t()[:width].t()):
        y, h = ops.rms_norm(part, weight, residual=part)
        expected, expected_h = ops.rms_norm(part.contiguous(), weight, residual=part.contiguous())
        assert_exact(y, expected)
        assert_exact(h, expected_h)


def test_gradients_that_are_expanded_or_absent(device: str) -> None:
    """A sum's gradient has stride 0 everywhere; either output of the residual form may go unused."""
    x, residual = (torch.randn(5, 96, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(96, device=device, requires_grad=True)
    y, h = ops.rms_norm(x, weight, residual=residual)
    for used in (y, h, y + h):
        plain_h = x + residual
        plain_y = blocks.rms_norm(plain_h, weight, 1e-6, 0.0, True)
        plain = {id(y): plain_y, id(h): plain_h}.get(id(used), plain_y + plain_h)
        inputs = [x, residual, weight]
        ours = torch.autograd.grad(used.sum(), inputs, retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(plain.sum(), inputs, allow_unused=True)
        for grad, reference in zip(ours, expected, strict=True):
            assert (grad is None) == (reference is None)
            if grad is not None:
                torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-4)


def test_no_rows(device: str) -> None:
    x = torch.randn(0, 64, device=device, requires_grad=True)
    weight = torch.randn(64, device=device, requires_grad=True)
    ops.rms_norm(x, weight).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 64)
    assert weight.grad is not None and float(weight.grad.abs().sum()) == 0.0


def test_a_row_worked_out_by_hand(device: str) -> None:
    """(3, 4) has mean square 12.5; with eps 0 and weights (1, 2) the row is (3, 8) / sqrt(12.5)."""
    x, weight = torch.tensor([[3.0, 4.0]], device=device), torch.tensor([1.0, 2.0], device=device)
    y = ops.rms_norm(x, weight, 0.0)
    torch.testing.assert_close(y.cpu(), torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


def test_one_column(device: str) -> None:
    """Its gradient is all cancellation; the value is the sign times the weight."""
    x = torch.tensor([[2.0], [-3.0]], device=device)
    y = ops.rms_norm(x, torch.tensor([5.0], device=device), 0.0)
    torch.testing.assert_close(y.flatten().cpu(), torch.tensor([5.0, -5.0]))


@pytest.mark.parametrize("cast_first", [True, False], ids=["llama", "gemma"])
def test_the_roundings_are_the_model_s(cast_first: bool, device: str) -> None:
    """In bfloat16 nearly every element has the bits of the formula, which differ between the two roundings."""
    x, weight = (torch.randn(shape, device=device).bfloat16() for shape in ((64, 1024), (1024,)))
    y = ops.rms_norm(x, weight, cast_first=cast_first)
    same = (y == blocks.rms_norm(x, weight, 1e-6, 0.0, cast_first)).double().mean()
    other = (y == blocks.rms_norm(x, weight, 1e-6, 0.0, not cast_first)).double().mean()
    assert float(same) > 0.99 > float(other)


def test_gradcheck() -> None:
    x, residual = (torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, r: ops.rms_norm(x, w, residual=r), (x, weight, residual))
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, offset=1.0, cast_first=False), (x, weight))


def test_registration(device: str) -> None:
    x, residual = (torch.randn(6, 40, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(40, device=device, requires_grad=True)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for added in (None, residual.detach()):
        arguments = (x.detach(), weight.detach(), added, 1e-6, 0.0, True)
        torch.library.opcheck(torch.ops.fastpeft.rms_norm.default, arguments, test_utils=utils)
    rstd = torch.rand(6, device=device)
    for dh, want_dweight in ((None, False), (residual.detach(), True)):
        arguments = (x.detach(), dh, x.detach(), rstd, weight.detach(), 0.0, True, want_dweight)
        torch.library.opcheck(torch.ops.fastpeft.rms_norm_backward.default, arguments, test_utils=utils)


def test_under_compile_and_checkpointing(device: str) -> None:
    x, residual = (torch.randn(6, 40, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(40, device=device, requires_grad=True)

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, h = ops.rms_norm(x, weight, residual=residual)
        return y * h

    def gradients(out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, residual, weight])]

    expected = gradients(block(x, residual, weight))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    kept = torch.utils.checkpoint.checkpoint(block, x, residual, weight, use_reentrant=False)
    for got in (gradients(compiled(x, residual, weight)), gradients(kept)):
        for value, reference in zip(got, expected, strict=True):
            assert_exact(value, reference)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    x, residual, dy = (torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)

    def step() -> list[Tensor]:
        y, h, rstd = torch.ops.fastpeft.rms_norm(x, weight, residual, 1e-6, 0.0, True)
        return [y, h, *torch.ops.fastpeft.rms_norm_backward(dy, dy, h, rstd, weight, 0.0, True, True)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for value, reference in zip(captured, step(), strict=True):
        assert_exact(value, reference)


def test_partial_rows_never_leave_a_block_without_rows() -> None:
    for rows in (0, 1, 7, 8192):
        for width in (1, 64, 128, 576, 4096, 16384, 99_999):
            for element_bytes in (2, 4):
                for sms in (0, 108, 132):
                    partial = native._C.rms_norm_partial_rows(rows, width, element_bytes, sms)
                    assert min(rows, 1) <= partial <= rows


def test_partial_rows_are_those_of_the_blocks_that_are_resident_at_once() -> None:
    blocks_an_sm = {128: 3, 256: 3, 264: 8, 1024: 8, 4096: 2, 8192: 1, 16384: 1, 99_999: 2}  # by width
    for width, count in blocks_an_sm.items():
        assert native._C.rms_norm_partial_rows(1_000_000, width, 2, 132) == 132 * count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(7)}, r"x has shape \(3, 8\) and the weight \(7,\)"),
        ({"x": torch.ones(3, 0), "weight": torch.ones(0)}, "width of at least 1"),
        ({"residual": torch.ones(2, 8)}, r"the residual \(2, 8\)"),
        ({"residual": torch.ones(3, 8).half()}, "must be alike"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "dtype torch.int64 is not supported"),
    ],
    ids=["weight", "empty", "residual-shape", "residual-dtype", "dtype"],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"rms_norm: .*{message}"):
        ops.rms_norm(**{"x": torch.ones(3, 8), "weight": torch.ones(8), **arguments})
