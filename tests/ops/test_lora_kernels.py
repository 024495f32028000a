"""The fused kernels of LoRA linears: when they are used, their numbers, and the memory they take."""

from __future__ import annotations

import pytest
import torch
from ops.test_lora import Layers, dtype_id
from ops.test_nf4_linear_plan import DEVICES
from tolerances import assert_exact, relative_error

from fastpeft import ops
from fastpeft.ops.native import _C, LoraPlan, device_limits, dtype_number

DROPOUT = pytest.mark.parametrize("dropout", [0.0, 0.3])
# Shapes of an 8B model.
MEMORY = pytest.mark.parametrize(
    ("n", "k", "rank"),
    [
        (4096, 4096, 16),
        (4096, 4096, 64),
        (14336, 4096, 16),
        (14336, 4096, 64),
        (4096, 14336, 16),
        (4096, 14336, 64),
    ],
)


def memory_allowed(m: int, n: int) -> float:
    """Bytes besides x, y and the gradients: 5% of y's."""
    return 0.05 * 2 * m * n


# --- when they are used ---
def plan(
    m: int = 8192,
    k: int = 4096,
    n: tuple[int, ...] = (4096,),
    r: tuple[int, ...] = (16,),
    block_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    aligned: bool = True,
    aligned_factors: bool = True,
    p: float = 0.0,
    device: str = "h100",
) -> LoraPlan:
    sizes = m, k, n, r, [block_size] * len(n), dtype_number("test", dtype)
    return LoraPlan(*_C.lora_linear_plan(*sizes, aligned, aligned_factors, p, *DEVICES[device]))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "1 adapter of 16 ranks in all"),
        ({"m": 256, "r": (1,)}, "1 adapter of 8 ranks in all"),
        ({"m": 1000, "n": (1112,), "k": 832, "dtype": torch.float16}, "1 adapter of 16 ranks in all"),
        ({"r": (256,)}, "1 adapter of 256 ranks in all"),
        ({"n": (4096, 1024, 1024), "r": (16, 4, 100)}, "3 adapters of 128 ranks in all"),
        ({"n": (64,) * 4, "r": (256,) * 4}, "4 adapters of 1024 ranks in all"),
    ],
    ids=str,
)
def test_nf4_bases_on_hopper_are_fused(changed: dict[str, object], reason: str) -> None:
    chosen = plan(**changed)  # type: ignore[arg-type]
    assert chosen.fused
    assert chosen.reason == f"fused: {reason}"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"m": 255}, "m is 255, below 256"),
        ({"n": (64,) * 5, "r": (8,) * 5}, "5 adapters, not 1 to 4"),
        ({"r": (257,)}, "an adapter of rank 264"),
        ({"dtype": torch.float32}, "x is not of a 16-bit type"),
        ({"p": 0.97}, "dropout 0.97 is above 0.96875"),
        ({"k": 4000}, "an adapter, k is 4000, no multiple of 64"),
        ({"n": (4096, 100), "r": (8, 8)}, "an adapter, n is 100, no multiple of 8"),
        ({"block_size": 32}, "an adapter, block size 32, below 64"),
        ({"aligned": False}, "an adapter, x or the codes are not aligned to 16 bytes"),
        ({"device": "a100"}, "an adapter, compute capability 80"),
        ({"device": "h100-without-sm90a"}, "an adapter, compute capability 90, built without sm_90a"),
        ({"device": "turing"}, "compute capability 75, below 80"),
    ],
    ids=str,
)
def test_the_rest_is_composed_for_a_reason(changed: dict[str, object], reason: str) -> None:
    chosen = plan(**changed)  # type: ignore[arg-type]
    assert not chosen.fused
    assert not chosen.beside
    assert chosen.reason == f"composed: {reason}"


@DROPOUT
@MEMORY
def test_planned_memory_beyond_x_and_y(n: int, k: int, rank: int, dropout: float) -> None:
    """A copy of A, xa and dxa, what is made beside takes, and what partial sums take beyond the memory of dx."""
    m, r = 8192, rank
    needs = plan(m=m, n=(n,), k=k, r=(r,), p=dropout)
    forward = 2 * r * (m if needs.xa_beside else m + k) + needs.xa_bytes + needs.forward_bytes
    sums = needs.after_bytes + max(0, needs.sums_bytes - 2 * m * k)
    backward = 4 * r * m + needs.dxa_bytes + needs.backward_bytes + sums
    assert max(forward, backward) < memory_allowed(m, n)


@pytest.mark.parametrize(
    ("changed", "beside"),
    [
        ({}, True),
        ({"r": (64,)}, True),
        ({"r": (72,)}, False),
        ({"r": (12,)}, False),
        ({"n": (4096, 1024, 1024), "r": (16, 16, 32)}, True),
        ({"n": (4096, 1024, 1024), "r": (32, 32, 8)}, False),
        ({"m": 1024}, True),
        ({"m": 1023}, False),
        ({"p": 0.05}, False),
        ({"p": 0.05, "n": (14336,)}, True),
        ({"p": 0.05, "n": (14336,), "r": (64,)}, False),
        ({"aligned_factors": False}, False),
    ],
    ids=str,
)
def test_when_something_may_be_made_beside(changed: dict[str, object], beside: bool) -> None:
    chosen = plan(**changed)  # type: ignore[arg-type]
    assert chosen.fused
    assert chosen.beside == beside
    made = [chosen.xa_beside, *chosen.dxa_beside, chosen.da_beside]
    assert any(made) == beside
    assert (chosen.xa_bytes > 0) == chosen.xa_beside
    assert (chosen.dxa_bytes > 0) == any(chosen.dxa_beside)


def test_the_plan_in_words() -> None:
    x = torch.randn(300, 64)
    dense = torch.randn(32, 64)
    assert ops.lora_linear_plan(x, [dense], [8]) == "composed: on the CPU"


# --- on the device ---


@pytest.fixture
def hopper() -> str:
    if not torch.cuda.is_available() or not device_limits(torch.device("cuda", 0))[-1]:
        pytest.skip("needs a Hopper, and a build with sm_90a")
    return "cuda"


def fused(*arguments: object) -> Layers:
    layers = Layers.make(*arguments, "nf4", "cuda")  # type: ignore[arg-type]
    reason = ops.lora_linear_plan(layers.x, layers.weights, [a.shape[0] for a in layers.a])
    assert reason.startswith("fused: ")
    return layers


SIZES = [(512, 512, 512), (257, 1112, 832), (700, 200, 2048), (2304, 2176, 320)]
SIZE = pytest.mark.parametrize("size", SIZES, ids=lambda size: "m{}-n{}-k{}".format(*size))


@pytest.mark.gpu
@SIZE
@DROPOUT
@pytest.mark.parametrize("rank", [1, 8, 16, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_forward_and_backward(
    dtype: torch.dtype, rank: int, dropout: float, size: tuple[int, int, int], hopper: str
) -> None:
    m, n, k = size
    layer = fused(m, (n,), k, rank, dropout, dtype)
    layer.check(layer.one_by_one)


@pytest.mark.gpu
@DROPOUT
@pytest.mark.parametrize("rank", [1, 16, 100])
@pytest.mark.parametrize("n", [(512, 128, 128), (1112, 1112), (64, 72, 80, 88)], ids=str)
def test_group(n: tuple[int, ...], rank: int, dropout: float, hopper: str) -> None:
    layers = fused(700, n, 832, rank, dropout, torch.bfloat16)
    layers.check(layers.together)


@pytest.mark.gpu
@DROPOUT
def test_group_is_its_layers_one_by_one(dropout: float, hopper: str) -> None:
    """Up to the order of their sums: the down-projection of 48 ranks divides the depth otherwise than that of 16."""
    layers = fused(700, (512, 128, 128), 832, 16, dropout, torch.bfloat16)
    both = zip(*(layers.outputs_and_gradients(run) for run in (layers.together, layers.one_by_one)), strict=True)
    for grouped, alone in both:
        assert relative_error(grouped, alone) <= torch.finfo(torch.bfloat16).eps / 2  # one rounding


@pytest.mark.gpu
@DROPOUT
def test_equal_runs_give_equal_bits(dropout: float, hopper: str) -> None:
    layers = fused(2304, (2176, 320), 832, 64, dropout, torch.bfloat16)
    first = layers.outputs_and_gradients(layers.together)
    for _ in range(3):
        for value, reference in zip(layers.outputs_and_gradients(layers.together), first, strict=True):
            assert_exact(value, reference)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "dropout"),
    [
        (1472, (576, 192, 192), 576, 16, 0.0),
        (1030, (512,), 1024, 64, 0.0),
        (2304, (2176, 320), 832, 24, 0.0),
        (2048, (1536, 1536, 64, 64), 128, 8, 0.0),
        (5120, (14336,), 3072, 16, 0.3),
    ],
    ids=str,
)
def test_beside_the_products(m: int, n: tuple[int, ...], k: int, rank: int, dropout: float, hopper: str) -> None:
    """Whatever is made beside them, and equal bits however the thread blocks meet."""
    chosen = plan(m=m, n=n, k=k, r=(rank,) * len(n), p=dropout)
    assert chosen.xa_beside or any(chosen.dxa_beside) or chosen.da_beside
    layers = fused(m, n, k, rank, dropout, torch.bfloat16)
    layers.check(layers.together)
    first = layers.outputs_and_gradients(layers.together)
    for _ in range(20):
        for value, reference in zip(layers.outputs_and_gradients(layers.together), first, strict=True):
            assert_exact(value, reference)


@pytest.mark.gpu
def test_only_what_is_asked_for_has_a_gradient(hopper: str) -> None:
    layers = fused(700, (512, 128), 832, 16, 0.3, torch.bfloat16)
    everything = layers.outputs_and_gradients(layers.together)[2:]
    for i, leaf in enumerate(layers.leaves):
        for other in layers.leaves:
            other.requires_grad_(other is leaf)
        torch.manual_seed(7)
        (grad,) = torch.autograd.grad(layers.together(), leaf, layers.dys)
        assert_exact(grad, everything[i])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16 adapter", "strided adapter", "strided x and dy", "x in three dimensions"])
def test_other_layouts(kind: str, hopper: str) -> None:
    layers = fused(512, (256, 128), 320, 16, 0.3, torch.bfloat16)
    expected = layers.outputs_and_gradients(layers.together)
    if kind == "bf16 adapter":  # the kernels round to bf16 anyway
        layers.a = [a.detach().to(torch.bfloat16).requires_grad_() for a in layers.a]
        layers.b = [b.detach().to(torch.bfloat16).requires_grad_() for b in layers.b]
        ours = layers.outputs_and_gradients(layers.together)
        assert {grad.dtype for grad in ours} == {torch.bfloat16}
        expected = [value.to(torch.bfloat16) for value in expected]
        # What is scaled before it is rounded differs in the last bit only where the scale is no power of two.
        expected[1], ours[1] = expected[0], ours[0]
    elif kind == "strided adapter":
        layers.a = [a.detach().t().contiguous().t().requires_grad_() for a in layers.a]
        ours = layers.outputs_and_gradients(layers.together)
    elif kind == "strided x and dy":
        layers.x = layers.x.detach().t().contiguous().t().requires_grad_()
        layers.dys = [dy.t().contiguous().t() for dy in layers.dys]
        ours = layers.outputs_and_gradients(layers.together)
    else:
        layers.x = layers.x.detach().reshape(2, 256, -1).requires_grad_()
        layers.dys = [dy.reshape(2, 256, -1) for dy in layers.dys]
        ours = layers.outputs_and_gradients(layers.together)
    for value, reference in zip(ours, expected, strict=True):
        assert_exact(value.reshape(reference.shape), reference)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k", "base", "reason"),
    [
        (300, 96, 128, "dense", "a dense base"),
        (37, 96, 128, "nf4", "m is 37, below 256"),
        (300, 100, 128, "nf4", "an adapter, n is 100, no multiple of 8"),
        (300, 96, 160, "nf4", "an adapter, k is 160, no multiple of 64"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take(m: int, n: int, k: int, base: str, reason: str, hopper: str) -> None:
    layers = Layers.make(m, (n, 64), k, 8, 0.3, torch.bfloat16, base, "cuda")
    assert ops.lora_linear_plan(layers.x, layers.weights, [8, 8]) == f"composed: {reason}"
    layers.check(layers.together)


@pytest.mark.gpu
def test_x_off_the_grid_of_16_bytes(hopper: str) -> None:
    layers = Layers.make(300, (96,), 128, 8, 0.3, torch.bfloat16, "nf4", "cuda")
    store = torch.randn(300 * 128 + 1, device="cuda", dtype=torch.bfloat16)
    layers.x = store[1:].view(300, 128).requires_grad_()
    assert "not aligned" in ops.lora_linear_plan(layers.x, layers.weights, [8])
    layers.check(layers.one_by_one)


@pytest.mark.gpu
@DROPOUT
@pytest.mark.parametrize("m", [1000, 1472])  # before and beside the products
def test_in_a_cuda_graph(m: int, dropout: float, hopper: str) -> None:
    """Nothing waits for the device, and a replay reads what is in the inputs then."""
    layers = fused(m, (512, 128), 320, 16, dropout, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            layers.outputs_and_gradients(layers.together)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = layers.outputs_and_gradients(layers.together)
    torch.cuda.synchronize()
    with torch.no_grad():
        for leaf in layers.leaves:
            leaf.copy_(torch.randn_like(leaf) / leaf.shape[1] ** 0.5)
    torch.cuda.synchronize()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for value, reference in zip(out, layers.outputs_and_gradients(layers.together), strict=True):
        assert_exact(value, reference)


@pytest.mark.gpu
def test_compiles_without_a_graph_break(hopper: str) -> None:
    layers = fused(512, (256, 128), 320, 16, 0.3, torch.bfloat16)
    compiled = torch.compile(layers.together, fullgraph=True, backend="aot_eager")
    both = zip(*(layers.outputs_and_gradients(run) for run in (compiled, layers.together)), strict=True)
    for value, reference in both:
        assert_exact(value, reference)


@pytest.mark.gpu
def test_opcheck(hopper: str) -> None:
    layers = fused(256, (64, 72), 128, 3, 0.5, torch.bfloat16)
    x, a, b = layers.x.detach(), [t.detach() for t in layers.a], [t.detach() for t in layers.b]
    bases = [tensor for w in layers.weights for tensor in w.operands[:-1]]  # type: ignore[union-attr]
    rest = (bases, [64, 64], [64, 72], 128, a, b, [2.0, 3.0], 0.5, torch.tensor(3))
    library = torch.ops.fastpeft
    torch.library.opcheck(library.lora_linear.default, (x, *rest, layers.biases))
    *_, xa = library.lora_linear(x, *rest, layers.biases)
    torch.library.opcheck(library.lora_linear_backward.default, (layers.dys, x, xa, *rest, True, True))


@pytest.mark.gpu
@DROPOUT
@MEMORY
def test_memory_beyond_x_and_y(n: int, k: int, rank: int, dropout: float, hopper: str) -> None:
    layer = fused(8192, (n,), k, rank, dropout, torch.bfloat16)
    layer.outputs_and_gradients(layer.one_by_one)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # blocks that are in use again may be larger than what is asked for
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = layer.outputs_and_gradients(layer.one_by_one)
    beyond = torch.cuda.max_memory_allocated() - before - sum(result.nbytes for result in results)
    assert beyond < memory_allowed(8192, n), f"{beyond / 2**20:.1f} MB"
