"""Products of tokens sorted by expert: which way they go, against float64, gradients, graphs, errors."""

from __future__ import annotations

import re

import pytest
import torch
from ops.test_nf4_linear_plan import DEVICES
from tolerances import RATIO, assert_exact, assert_ratio
from torch import Tensor

from fastpeft import ops
from fastpeft.ops.native import _C, ExpertsPlan, dtype_number


def plan(
    m: int, experts: int, n: int, k: int, device: str = "h100", dtype: torch.dtype = torch.bfloat16, block: int = 64
) -> ExpertsPlan:
    number = dtype_number("test", dtype)
    return ExpertsPlan(*_C.nf4_experts_plan(m, experts, n, k, False, block, number, True, *DEVICES[device]))


def ends_of(counts: list[int], device: str) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(device, torch.int32)


def weight(experts: int, n: int, k: int, dtype: torch.dtype, device: str, **options: object) -> ops.NF4Weight:
    scales = torch.arange(1, experts + 1).view(-1, 1, 1)  # that experts are told apart
    return ops.nf4_quantize((torch.randn(experts, n, k) * scales / k**0.5).to(device, dtype), **options)


def one_by_one(x: Tensor, w: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    parts, begin = [], 0
    for expert, end in enumerate(ends.tolist()):
        parts.append(x[begin:end] @ (w[expert] if transposed else w[expert].t()))
        begin = end
    return torch.cat(parts)


def test_the_tiles_grow_with_the_tokens_of_an_expert() -> None:
    assert plan(8, 128, 1536, 2048).reason == "tiles: 128 x 64, clusters of 1"
    assert plan(128 * 128, 128, 1536, 2048).reason == "tiles: 128 x 128, clusters of 1"
    assert plan(8 * 4096, 8, 28672, 4096).reason == "tiles: 128 x 256, clusters of 2"
    assert plan(8, 128, 1536, 2048).workspace_bytes == 16 * (1 + 8)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (plan(8, 8, 64, 64, "a100"), "compute capability 80"),
        (plan(8, 8, 64, 64, dtype=torch.float32), "no 16-bit type|not of a 16-bit type"),
        (plan(8, 8, 64, 96), "no multiples of 64 and 8"),
        (plan(8, 8, 100, 64), "no multiples of 64 and 8"),
        (plan(8, 2000, 64, 64), "2000 experts"),
        (plan(8, 8, 64, 64, block=32), "block size 32"),
        (plan(0, 8, 64, 64), "nothing to multiply"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_rest_is_one_by_one(found: ExpertsPlan, message: str) -> None:
    assert not found.fused and re.search(message, found.reason), found.reason


COUNTS = {
    "even": [5, 5, 5, 5],
    "some-empty": [0, 17, 0, 3],
    "one-has-all": [0, 0, 33, 0],
    "none-at-all": [0, 0, 0, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_it_is_the_products_one_by_one(counts: list[int], dtype: torch.dtype, device: str) -> None:
    """Sizes that no launch takes together, in float32 none."""
    w, ends = weight(4, 100, 32, dtype, device), ends_of(counts, device)
    dense = ops.nf4_dequantize(w, torch.float32).double()
    x = torch.randn(sum(counts), 32).to(device, dtype).requires_grad_()
    y = ops.nf4_linear_experts(x, w, ends)
    dy = torch.randn(sum(counts), 100).to(device, dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    for out, given, transposed in ((y, x, False), (dx, dy, True)):
        exact = one_by_one(given.double(), dense, ends, transposed)
        assert_ratio(out, one_by_one(given, ops.nf4_dequantize(w), ends, transposed), exact)


def test_what_does_not_fit_is_refused() -> None:
    w, ends, x = weight(4, 64, 32, torch.float32, "cpu"), ends_of([1, 1, 1, 1], "cpu"), torch.randn(4, 32)
    for arguments, message in (
        ((torch.randn(4, 33), w, ends), "x has shape"),
        ((torch.randn(1, 4, 32), w, ends), "x has shape"),
        ((x, w, ends[:3]), r"ends is \(3,\)"),
        ((x, w, ends.long()), "ends is .* of torch.int64"),
        ((x, ops.nf4_quantize(torch.randn(64, 32)), ends), "must be \\(experts, n, k\\)"),
        ((torch.randn(4, 4), ops.nf4_quantize(torch.randn(4, 4, 4)), ends), "multiple of the block size"),
    ):
        with pytest.raises(ValueError, match=f"nf4_linear_experts: .*{message}"):
            ops.nf4_linear_experts(*arguments)


def test_a_compiler_sees_its_shapes() -> None:
    w, ends = weight(4, 64, 32, torch.float32, "cpu"), ends_of([1, 2, 0, 4], "cpu")
    x = torch.randn(7, 32)
    torch.library.opcheck(torch.ops.fastpeft.nf4_linear_experts, (x, ends, *w.operands, 64, 32, False))


# On Hopper.

SIZES = {
    "qwen3-moe": (16, 1536, 2048),
    "ragged": (5, 136, 192),  # strips reach into the next expert's weight
    "deep": (3, 64, 1024 + 64),
    "many": (128, 64, 64),
}
TOKENS = {
    "one": lambda experts: [0] * (experts - 1) + [1],
    "few": lambda experts: [i % 3 for i in range(experts)],
    "odd": lambda experts: [37 * (i % 5) for i in range(experts)],
    "hundreds": lambda experts: [300 + 41 * (i % 4) for i in range(min(16, experts))] + [0] * max(0, experts - 16),
    "uneven": lambda experts: [1500, 1, 0][: min(3, experts)] + [2] * (experts - 3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
def test_together_is_as_exact_as_decoding(size: str, tokens: str, dtype: torch.dtype, transposed: bool) -> None:
    """Against float64, at most twice the error of dequantising and multiplying; equal to the bit in a second run."""
    experts, n, k = SIZES[size]
    w, ends = weight(experts, n, k, dtype, "cuda"), ends_of(TOKENS[tokens](experts), "cuda")
    m, depth, out = int(ends[-1]), n if transposed else k, k if transposed else n
    x = torch.randn(m, depth, device="cuda", dtype=dtype)
    if ops.build_info()["cuda"] and torch.cuda.get_device_capability() == (9, 0):
        assert ops.nf4_linear_experts_plan(x, w, transposed).startswith("tiles")

    def run() -> Tensor:
        torch.full((m, out), float("nan"), dtype=dtype, device="cuda")  # in the memory that y is likely to get
        y: Tensor = torch.ops.fastpeft.nf4_linear_experts(x, ends, *w.operands, n, k, transposed)
        return y

    y, again = run(), run()
    exact = one_by_one(x.double(), ops.nf4_dequantize(w, torch.float32).double(), ends, transposed)
    plain = one_by_one(x, ops.nf4_dequantize(w, dtype), ends, transposed)
    floor = float(exact.abs().max()) * torch.finfo(dtype).eps
    allowed = max(RATIO * float((plain.double() - exact).abs().max()), floor)
    assert float((y.double() - exact).abs().max()) <= allowed
    assert_exact(again, y)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"double_quant": False}, {"block_size": 128}, {"block_size": 4096}], ids=["float-scales", "128", "4096"]
)
def test_other_scales(options: dict[str, object]) -> None:
    w, ends = weight(4, 128, 256, torch.bfloat16, "cuda", **options), ends_of([70, 0, 3, 260], "cuda")
    x = torch.randn(333, 256, device="cuda", dtype=torch.bfloat16)
    plain = one_by_one(x, ops.nf4_dequantize(w), ends)
    torch.testing.assert_close(ops.nf4_linear_experts(x, w, ends), plain, rtol=0.02, atol=0.05)


@pytest.mark.gpu
def test_a_graph_replays_with_other_numbers_of_tokens() -> None:
    w, ends = weight(8, 192, 256, torch.bfloat16, "cuda"), ends_of([8] * 8, "cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        ops.nf4_linear_experts(x, w, ends)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.nf4_linear_experts(x, w, ends)
        for counts in ([0, 1, 60, 3, 0, 0, 0, 0], [64] + [0] * 7, [0] * 7 + [64]):
            ends.copy_(ends_of(counts, "cuda"))
            x.copy_(torch.randn(64, 256))
            expected = ops.nf4_linear_experts(x, w, ends).clone()
            graph.replay()
            assert_exact(captured, expected)
