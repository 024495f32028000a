"""Products of one input with several NF4 weights: one launch where there is one, and equal to one by one."""

from __future__ import annotations

import pytest
import torch
from ops.test_nf4_linear_plan import DEVICES
from tolerances import RATIO, assert_exact

from fastpeft import ops
from fastpeft.ops import NF4Weight, nf4_group
from fastpeft.ops.native import _C, GroupPlan, dtype_number


def weights(sizes: list[int], k: int, dtype: torch.dtype, device: str) -> list[NF4Weight]:
    return [ops.nf4_quantize((torch.randn(n, k) * (i + 1) / k**0.5).to(device, dtype)) for i, n in enumerate(sizes)]


def plan(m: int, n: list[int], k: int, device: str = "h100", dtype: torch.dtype = torch.bfloat16) -> GroupPlan:
    return GroupPlan(*_C.nf4_linear_group_plan(m, n, k, dtype_number("test", dtype), *DEVICES[device]))


def test_few_tokens_are_one_launch() -> None:
    assert plan(1, [4096, 1024, 1024], 4096) == (True, 0, 0)
    assert plan(16, [14336, 14336], 4096).together
    assert plan(64, [14336, 14336], 4096).together and plan(17, [128, 128], 256).together
    assert plan(1, [4096, 1024, 1024], 4096, "a100").together


@pytest.mark.parametrize(
    ("m", "n", "k", "device"),
    [
        (65, [4096, 1024], 4096, "h100"),
        (17, [4096, 1024], 4096, "a100"),
        (1, [4096, 1024], 4096, "turing"),
        (1, [100, 1024], 4096, "h100"),
        (1, [4096, 1024], 4096 + 64, "h100"),
        (0, [4096, 1024], 4096, "h100"),
    ],
)
def test_the_rest_is_one_by_one(m: int, n: list[int], k: int, device: str) -> None:
    assert not plan(m, n, k, device).together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_products_one_by_one(dtype: torch.dtype, device: str) -> None:
    """Sizes that no launch takes together, in float32 no size at all."""
    ws = weights([100, 64, 8], 192, dtype, device)
    x = torch.randn(2, 5, 192).to(device, dtype)
    with torch.no_grad():
        outs = ops.nf4_linear_group(x, ws)
        for out, w in zip(outs, ws, strict=True):
            assert_exact(out, ops.nf4_linear(x, w))
            assert out.shape == (2, 5, w.n)


def test_gradients_reach_the_input() -> None:
    ws = weights([64, 32], 64, torch.float32, "cpu")
    x = torch.randn(3, 64, requires_grad=True)
    sum(out.sum() for out in ops.nf4_linear_group(x, ws)).backward()
    expected = sum(ops.nf4_dequantize(w).sum(0) for w in ws).expand(3, -1)
    torch.testing.assert_close(x.grad, expected)


def test_sizes_that_do_not_fit_are_refused() -> None:
    ws = weights([64, 32], 64, torch.float32, "cpu")
    with pytest.raises(ValueError, match="nf4_linear_group: x has shape"):
        ops.nf4_linear_group(torch.randn(3, 65), ws)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 17, 32, 33, 48, 64], ids="m{}".format)
@pytest.mark.parametrize(
    ("sizes", "k"),
    [([4096, 1024, 1024], 4096), ([14336, 14336], 4096), ([128, 256], 256), ([384, 128, 2048], 1280)],
    ids=["attention", "mlp", "small", "ragged"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_launch_is_as_exact_as_decoding(dtype: torch.dtype, sizes: list[int], k: int, m: int) -> None:
    """Against float64, at most twice the error of dequantising and multiplying; equal to the bit in a second run."""
    ws = weights(sizes, k, dtype, "cuda")
    x = torch.randn(m, k).to("cuda", dtype)
    columns = [list(column) for column in zip(*(w.operands[:5] for w in ws), strict=True)]
    assert nf4_group._plan(x, columns[0], columns[1], sizes) is not None

    def run() -> list[torch.Tensor]:
        torch.full((m, sum(sizes)), float("nan"), dtype=dtype, device="cuda")  # in the memory that y is likely to get
        with torch.no_grad():
            return ops.nf4_linear_group(x, ws)

    outs, again = run(), run()
    for out, other, w in zip(outs, again, ws, strict=True):
        exact = x.double() @ ops.nf4_dequantize(w, torch.float32).double().t()
        plain = x @ ops.nf4_dequantize(w, dtype).t()
        floor = float(exact.abs().max()) * torch.finfo(dtype).eps
        allowed = max(RATIO * float((plain.double() - exact).abs().max()), floor)
        assert float((out.double() - exact).abs().max()) <= allowed
        assert_exact(other, out)


@pytest.mark.gpu
def test_a_foreign_map_is_not_mixed_with_others() -> None:
    """One launch reads one map of scales."""
    ws = weights([128, 128], 256, torch.bfloat16, "cuda")
    assert ws[1].nested_map is not None
    foreign = NF4Weight(
        ws[1].codes,
        ws[1].absmax,
        ws[1].nested_absmax,
        ws[1].nested_map * 2,
        ws[1].offset,
        ws[1].shape,
        64,
        torch.bfloat16,
    )
    x = torch.randn(20, 256).to("cuda", torch.bfloat16)
    with torch.no_grad():
        outs = ops.nf4_linear_group(x, [ws[0], foreign])
        assert_exact(outs[1], ops.nf4_linear(x, foreign))


@pytest.mark.gpu
def test_a_graph_replays_it() -> None:
    ws = weights([128, 384], 256, torch.bfloat16, "cuda")
    x = torch.randn(40, 256).to("cuda", torch.bfloat16)
    with torch.no_grad():
        ops.nf4_linear_group(x, ws)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.nf4_linear_group(x, ws)
        x.copy_(torch.randn(40, 256))
        expected = [out.clone() for out in ops.nf4_linear_group(x, ws)]
        graph.replay()
        for out, wanted in zip(captured, expected, strict=True):
            assert_exact(out, wanted)
