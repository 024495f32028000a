"""LoRA linears for few tokens without a gradient, on the GPU: against float64, beside the composed form."""

from __future__ import annotations

import pytest
import torch
from ops.test_lora import Layers, dtype_id
from tolerances import assert_exact, assert_ratio
from torch import Tensor

from fastpeft import ops
from fastpeft.ops import lora_few

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
# name: (n of each, k, rank)
SHAPES = {
    "attention": ((4096, 1024, 1024), 4096, 16),
    "mlp": ((14336, 14336), 4096, 8),
    "down": ((4096,), 14336, 16),
    "smollm": ((576, 192, 192), 576, 16),
    "odd-rank": ((136, 72), 128, 3),
    "rank-64": ((256, 128), 1536, 64),
    "four": ((128, 128, 128, 128), 192, 20),
}


def exact(these: Layers) -> list[Tensor]:
    """In float64, of the decoded base."""
    ys = []
    for w, a, b, bias, scale in zip(these.weights, these.a, these.b, these.biases, these.scales, strict=True):
        dense = ops.nf4_dequantize(w, torch.float32) if isinstance(w, ops.NF4Weight) else w
        x = these.x.double()
        ys.append(x @ dense.double().t() + bias.double() + scale * (x @ a.double().t()) @ b.double().t())
    return ys


def composed(these: Layers) -> list[Tensor]:
    """As the framework computes it, in the dtype of x."""
    ys = []
    for w, a, b, bias, scale in zip(these.weights, these.a, these.b, these.biases, these.scales, strict=True):
        dense = ops.nf4_dequantize(w, these.x.dtype) if isinstance(w, ops.NF4Weight) else w
        xa = these.x @ a.to(these.x.dtype).t()
        ys.append(torch.nn.functional.linear(these.x, dense, bias).addmm_(xa, b.to(xa.dtype).t(), alpha=scale))
    return ys


@pytest.mark.parametrize("m", [1, 4, 5, 16, 17, 33, 64], ids="m{}".format)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@torch.no_grad()
def test_as_exact_as_the_composed_form(
    dtype: torch.dtype, base: str, shape: tuple[tuple[int, ...], int, int], m: int
) -> None:
    n, k, rank = shape
    these = Layers.make(m, n, k, rank, 0.0, dtype, base, "cuda")
    assert lora_few.takes(these.x, these.a, these.b, these.biases)
    for biases in (these.biases, [torch.zeros_like(bias) for bias in these.biases]):
        these.biases = biases
        given = None if all(not bias.any() for bias in biases) else biases

        def run(given: list[Tensor] | None = given) -> list[Tensor]:
            for size in n:
                torch.full((m, size), float("nan"), dtype=dtype, device="cuda")  # in the memory that y may get
            return ops.lora_linear_group(these.x, these.weights, these.a, these.b, these.scales, given)

        ys = run()
        for y, plain, reference, again in zip(ys, composed(these), exact(these), run(), strict=True):
            assert_ratio(y, plain, reference)
            assert_exact(again, y)


@torch.no_grad()
def test_it_is_added_in_place() -> None:
    these = Layers.make(6, (256,), 512, 16, 0.0, torch.bfloat16, "nf4", "cuda")
    (w,), (a,), (b,), (scale,) = these.weights, these.a, these.b, these.scales
    assert isinstance(w, ops.NF4Weight)
    y = torch.randn(2, 3, 256, device="cuda", dtype=torch.bfloat16)
    x = these.x.view(2, 3, 512)
    expected = y.double() + ops.lora_linear(x, w, a, b, scale).double()
    assert lora_few.few_add_(y, x, w, a, b, scale) is y
    assert (y.double() - expected).abs().max() <= 2 * torch.finfo(y.dtype).eps * expected.abs().max()


def test_what_is_to_be_differentiated_goes_the_other_way() -> None:
    these = Layers.make(2, (128,), 128, 8, 0.0, torch.bfloat16, "nf4", "cuda")
    assert not lora_few.takes(these.x, these.a, these.b, [])
    with torch.no_grad():
        assert lora_few.takes(these.x, these.a, these.b, [])
        assert not lora_few.takes(these.x.float(), these.a, these.b, [])
        assert not lora_few.takes(these.x.expand(40, -1, -1), these.a, these.b, [])


def test_a_graph_sees_new_factors() -> None:
    """An adapter that is trained between replays."""
    these = Layers.make(4, (256, 128), 256, 16, 0.0, torch.bfloat16, "nf4", "cuda")
    with torch.no_grad():

        def run() -> list[Tensor]:
            return ops.lora_linear_group(these.x, these.weights, these.a, these.b, these.scales)

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for factor in (*these.a, *these.b):
            factor.mul_(-1.5)
        graph.replay()
        for y, expected in zip(captured, run(), strict=True):
            assert_exact(y, expected)
