"""Products with an NF4 weight on the GPU, every kernel, against float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import RATIO, assert_exact
from torch import Tensor

from fastpeft import ops
from fastpeft.ops import NF4Weight, native

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
# name: (n, k); what each is there for
SHAPES = {
    "aligned": (256, 1024),
    "one-block": (8, 64),
    "rows-end-in-a-tile": (100, 64),
    "ragged-k": (300, 96),
    "odd": (129, 33),
    "n4104-k4160": (4104, 4160),
    "chunk-ends-early": (1112, 832),
}
TOKENS = [1, 7, 17, 48, 65, 257, 1000]


@pytest.fixture(params=["own", "ampere"])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of this GPU, then those that an A100 would take."""
    if request.param == "ampere":
        real = native.device_limits
        monkeypatch.setattr(native, "device_limits", lambda device: (80, *real(device)[1:3], False))
    return str(request.param)


def weight(n: int, k: int, dtype: torch.dtype, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    return ops.nf4_quantize((torch.randn(n, k) / k**0.5).to("cuda", dtype), block_size, double_quant)


def worst(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).abs().max())


def poison(like: Tensor) -> None:
    """NaN in the memory that the next output is likely to get."""
    torch.full_like(like, float("nan"))


def assert_product(x: Tensor, w: NF4Weight, transposed: bool, bias: Tensor | None = None) -> None:
    """The largest error is at most twice that of dequantising and multiplying; two runs give the same bits."""
    exact_w, dense = ops.nf4_dequantize(w, torch.float32).double(), ops.nf4_dequantize(w, x.dtype)
    if transposed:
        exact, plain = x.double() @ exact_w, x @ dense
    else:
        exact, plain = x.double() @ exact_w.t(), torch.nn.functional.linear(x, dense, bias)
        exact = exact if bias is None else exact + bias.double()

    def run() -> Tensor:
        poison(plain)
        if transposed:
            return torch.ops.fastpeft.nf4_linear_dx(x, *w.operands, w.n, w.k)
        return ops.nf4_linear(x, w, bias)

    y = run()
    assert y.shape == plain.shape and y.dtype == plain.dtype
    # One rounding of the largest value: plain may be exact by luck where there are few values.
    floor = float(exact.abs().max()) * torch.finfo(x.dtype).eps
    assert worst(y, exact) <= max(RATIO * worst(plain, exact), floor), ops.nf4_linear_plan(x, w, transposed)
    assert_exact(run(), y)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("m", TOKENS, ids="m{}".format)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(dtype: torch.dtype, shape: tuple[int, int], m: int, transposed: bool, architecture: str) -> None:
    n, k = shape
    w = weight(n, k, dtype, double_quant=m != 17)
    x = torch.randn(m, n if transposed else k, device="cuda", dtype=dtype)
    assert_product(x, w, transposed, None if transposed else torch.randn(n, device="cuda", dtype=dtype))


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("m", [33, 64, 128, 256, 512, 1024, 4096], ids="m{}".format)
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 14336), (14336, 1024)], ids=str)
def test_every_tile(shape: tuple[int, int], m: int, transposed: bool) -> None:
    n, k = shape
    w = weight(n, k, torch.bfloat16)
    assert_product(torch.randn(m, n if transposed else k, device="cuda", dtype=torch.bfloat16), w, transposed)


@pytest.mark.parametrize("block_size", [32, 128, 4096])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
def test_other_block_sizes(block_size: int, transposed: bool, double_quant: bool, architecture: str) -> None:
    w = weight(264, 576, torch.bfloat16, block_size, double_quant)
    assert_product(torch.randn(70, 264 if transposed else 576, device="cuda", dtype=torch.bfloat16), w, transposed)


@pytest.mark.parametrize("m", [3, 40, 600], ids="m{}".format)
def test_non_contiguous_and_misaligned_x(m: int) -> None:
    w = weight(128, 256, torch.bfloat16)
    contiguous = torch.randn(m, 256, device="cuda", dtype=torch.bfloat16)
    expected = ops.nf4_linear(contiguous, w)
    assert_exact(ops.nf4_linear(contiguous.t().contiguous().t(), w), expected)
    misaligned = torch.empty(m * 256 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(m, 256).copy_(contiguous)
    if m < 512:  # above, a small weight is dequantised
        assert "not aligned" in ops.nf4_linear_plan(misaligned, w)
    assert_product(misaligned, w, False)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("m", [0, 40, 300], ids="m{}".format)
def test_streams_and_graphs(m: int, transposed: bool) -> None:
    """Two graphs that share a stream's capture may be replayed at the same time on two streams."""
    w = weight(4096, 4096, torch.bfloat16)
    xs = [torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def run(x: Tensor) -> Tensor:
        return torch.ops.fastpeft.nf4_linear_dx(x, *w.operands, w.n, w.k) if transposed else ops.nf4_linear(x, w)

    expected = [run(x) for x in xs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    graphs, captured = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()], []
    for graph, x in zip(graphs, xs, strict=True):
        with torch.cuda.graph(graph):
            captured.append([run(x) for _ in range(5)])
    for _ in range(10):
        for outputs in captured:
            for y in outputs:
                y.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(torch.cuda.Stream()):
            eager = run(xs[0])
        torch.cuda.synchronize()
        assert_exact(eager, expected[0])
        for outputs, y in zip(captured, expected, strict=True):
            for got in outputs:
                assert_exact(got, y)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("m", [1, 64, 300, 2048], ids="m{}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_extra_memory_is_at_most_32_mb(dtype: torch.dtype, m: int, transposed: bool, architecture: str) -> None:
    n, k = 14336, 8192  # 235 MB in 16 bits
    w = weight(n, k, torch.bfloat16)
    x = torch.randn(m, n if transposed else k, device="cuda", dtype=dtype)
    out_bytes = m * (k if transposed else n) * dtype.itemsize
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = torch.ops.fastpeft.nf4_linear_dx(x, *w.operands, n, k) if transposed else ops.nf4_linear(x, w)
    extra = torch.cuda.max_memory_allocated() - before - out_bytes
    slab_rows = (32 << 20) // (k * dtype.itemsize)  # float32 goes by slabs, whose products are put together
    assert extra <= (32 << 20) + (m * slab_rows * dtype.itemsize if dtype == torch.float32 else 0) + (1 << 20)
    assert y.isfinite().all()


def test_opcheck_and_compile() -> None:
    w = weight(256, 512, torch.bfloat16)
    x, dy = (torch.randn(40, size, device="cuda", dtype=torch.bfloat16) for size in (512, 256))
    torch.library.opcheck(torch.ops.fastpeft.nf4_linear.default, (x, *w.operands, 256, 512, None))
    torch.library.opcheck(torch.ops.fastpeft.nf4_linear_dx.default, (dy, *w.operands, 256, 512))
    compiled = torch.compile(lambda x: ops.nf4_linear(x, w).float().sin(), fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    compiled(x).sum().backward()
    got, x.grad = x.grad, None
    ops.nf4_linear(x, w).float().sin().sum().backward()
    assert got is not None and x.grad is not None
    assert_exact(got, x.grad)


@pytest.mark.parametrize("m", [1, 7, 16, 17, 33, 64, 65], ids="m{}".format)
@pytest.mark.parametrize("shape", [(4096, 14336), (4096, 4096), (136, 256), (100, 320)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adding_is_the_product_and_a_sum(dtype: torch.dtype, shape: tuple[int, int], m: int) -> None:
    """Both rounded, so that it is equal to the bit; shapes and sizes that no kernel adds for are among them."""
    n, k = shape
    w = weight(n, k, dtype)
    x, y = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(m, n, device="cuda", dtype=dtype)
    expected = y + ops.nf4_linear(x, w)
    assert ops.nf4_linear_add_(y, x, w) is y
    assert_exact(y, expected)
