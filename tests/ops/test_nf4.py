"""NF4 quantise, dequantise and products, on every device."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_exact, assert_ratio, assert_statistical
from torch import Tensor

from fastpeft import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
# name: (n, k); what each is there for
LINEARS = {"aligned": (128, 256), "ragged-rows": (100, 96), "block-straddles-rows": (24, 40), "one-row": (1, 64)}


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def awkward(numel: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal values with a block of zeros, an outlier and subnormal numbers among them."""
    w = torch.randn(numel, device=device)
    if numel > 5000:
        w[:4096] = 0
        w[4100] = 300.0
        w[4500:4600] *= 1e-40
    return w.to(dtype)


# --- against bitsandbytes ---
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_bits_equal_bitsandbytes(dtype: torch.dtype, block_size: int, double_quant: bool, device: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for numel in (1, 2, 63, 64, 65, 1000, 4096, 64 * 300, 64 * 257 + 3, 100_001):
        w = awkward(numel, dtype, device)
        ours = ops.nf4_quantize(w, block_size, double_quant)
        codes, state = bnb.quantize_4bit(w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")
        assert_exact(ours.codes, codes)
        assert_exact(ours.absmax, state.absmax)
        if double_quant:
            assert ours.nested_absmax is not None and ours.nested_map is not None and ours.offset is not None
            assert_exact(ours.nested_map, state.state2.code)
            assert_exact(ours.nested_absmax, state.state2.absmax)
            assert_exact(ours.offset, state.offset)
        assert_exact(ops.nf4_dequantize(ours), bnb_dequantize(bnb, codes, state))


def bnb_dequantize(bnb: object, codes: Tensor, state: object) -> Tensor:
    """bitsandbytes' value without its torch.compile path: scales by its own op, levels by a table."""
    if codes.is_cuda:
        return bnb.dequantize_4bit(codes, state)  # type: ignore[attr-defined]
    absmax = state.absmax  # type: ignore[attr-defined]
    if state.nested:  # type: ignore[attr-defined]
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset  # type: ignore[attr-defined]
    flat = codes.flatten()
    index = torch.stack([flat >> 4, flat & 15], 1).flatten().long()[: state.shape.numel()]  # type: ignore[attr-defined]
    scales = absmax.repeat_interleave(state.blocksize)[: index.numel()]  # type: ignore[attr-defined]
    return (state.code[index] * scales).to(state.dtype)  # type: ignore[attr-defined]


def test_state_dict_equals_bitsandbytes(device: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    w = torch.randn(48, 128, device=device, dtype=torch.bfloat16)
    codes, state = bnb.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
    expected = {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    ours = ops.nf4_quantize(w).state_dict()
    assert sorted(ours) == sorted(expected)
    for key, value in expected.items():
        assert_exact(ours[key], value)
    assert_exact(ops.nf4_dequantize(ops.NF4Weight.from_state_dict(expected)), ops.nf4_dequantize(ops.nf4_quantize(w)))


# --- by its own definition ---
def test_a_block_worked_out_by_hand() -> None:
    """Absmax 2: 2 -> level 1.0 (code 15), -2 -> -1.0 (code 0), 0 -> code 7, 0.9/2 = 0.45 -> level 0.4407 (code 12)."""
    w = torch.zeros(64)
    w[:4] = torch.tensor([2.0, -2.0, 0.0, 0.9])
    q = ops.nf4_quantize(w, double_quant=False)
    assert q.codes[:2, 0].tolist() == [0xF0, 0x7C]
    assert q.absmax.tolist() == [2.0]
    assert ops.nf4_dequantize(q)[:4].tolist() == [2.0, -2.0, 0.0, 2 * 0.44070982933044434]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_quantising_a_decoded_tensor_changes_nothing(dtype: torch.dtype, device: str) -> None:
    once = ops.nf4_dequantize(ops.nf4_quantize(torch.randn(256, 64, device=device).to(dtype), double_quant=False))
    assert_exact(ops.nf4_dequantize(ops.nf4_quantize(once, double_quant=False)), once)


def test_error_on_normal_weights_is_what_the_format_allows(device: str) -> None:
    """QLoRA's levels leave about 9.1% relative error on a normal block of 64; double quantisation adds little."""
    w = torch.randn(2048, 64, device=device)
    for double_quant, mean in ((False, 0.0925), (True, 0.0935)):
        error = (ops.nf4_dequantize(ops.nf4_quantize(w, double_quant=double_quant)) - w).norm(dim=1) / w.norm(dim=1)
        assert_statistical(error, mean)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_both_devices_decode_to_the_same_bits(dtype: torch.dtype) -> None:
    w = ops.nf4_quantize(torch.randn(300, 64, dtype=dtype))
    assert_exact(ops.nf4_dequantize(w.to("cuda")), ops.nf4_dequantize(w))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    """Indices past 2^31 once wrapped to negative in a 32-bit kernel; the tail of a large tensor shows it."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    rows = (2**31 + 2**20) // 4096
    w = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    decoded = ops.nf4_dequantize(ops.nf4_quantize(w, double_quant=False))
    tail = ops.nf4_dequantize(ops.nf4_quantize(w[-300:].clone(), double_quant=False))
    assert_exact(decoded[-300:], tail)


@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_narrower_cpu_units_give_the_same_bits(level: str, tmp_path: object) -> None:
    import os
    import subprocess
    import sys

    script = (
        "import torch; from fastpeft import ops; torch.manual_seed(3); w = torch.randn(70, 77);"
        "d = [ops.nf4_dequantize(ops.nf4_quantize(w.to(t), b)) for t in (torch.float32, torch.float16, torch.bfloat16)"
        " for b in (32, 64, 4096)]; print([x.double().cumsum(0).sum().item() for x in d])"
    )

    def run(value: str) -> str:
        environment = {**os.environ, "FASTPEFT_CPU": value}
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout

    assert run(level) == run("")


# --- products ---
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("shape", LINEARS.values(), ids=LINEARS)
@pytest.mark.parametrize("m", [0, 1, 7, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_linear_forward_and_backward(
    dtype: torch.dtype, m: int, shape: tuple[int, int], block_size: int, device: str
) -> None:
    n, k = shape
    w = ops.nf4_quantize((torch.randn(n, k) / k**0.5).to(device, dtype), block_size)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(n, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(m, n, device=device, dtype=dtype)
    y = ops.nf4_linear(x, w, bias)
    y.backward(dy)
    assert x.grad is not None and bias.grad is not None

    dense = ops.nf4_dequantize(w)
    plain_x = x.detach().clone().requires_grad_()
    plain = torch.nn.functional.linear(plain_x, dense, bias)
    plain.backward(dy)
    exact, exact_x, exact_dy = dense.double(), x.detach().double(), dy.double()
    assert_ratio(y, plain, exact_x @ exact.t() + bias.detach().double())
    assert_ratio(x.grad, plain_x.grad, exact_dy @ exact)


# name: (n, k); each has something the kernel for few tokens must get right
FEW_TOKENS = {
    "aligned": (256, 1024),
    "one-unit": (16, 64),
    "rows-end-in-a-unit": (100, 192),
    "fewer-rows-than-a-unit": (8, 128),
    "half-an-item-at-the-end": (333, 2112),
    "many-units-a-block": (14336, 1024),
    "long-k": (300, 14336),
    "n8461-k2176": (8461, 2176),  # more than one group of rows for a block
}


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("shape", FEW_TOKENS.values(), ids=FEW_TOKENS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_few_tokens(dtype: torch.dtype, shape: tuple[int, int], m: int, double_quant: bool) -> None:
    n, k = shape
    w = ops.nf4_quantize((torch.randn(n, k) / k**0.5).to("cuda", dtype), 64, double_quant)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    assert ops.nf4_linear_plan(x, w).startswith("decode")
    exact = ops.nf4_dequantize(w, torch.float32).double()
    plain = torch.nn.functional.linear(x, ops.nf4_dequantize(w, dtype), bias)
    torch.full((4 * m * n + 1024,), float("nan"), device="cuda", dtype=dtype)  # poisons what is allocated next
    y = ops.nf4_linear(x, w, bias)
    assert_ratio(y, plain, x.double() @ exact.t() + bias.double())
    assert_exact(ops.nf4_linear(x, w, bias), y)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [64, 128, 4096])
def test_few_tokens_with_larger_blocks(block_size: int) -> None:
    """A block may cover several rows; the scale of a row then begins in the middle of a block."""
    w = ops.nf4_quantize((torch.randn(100, 192) / 14).to("cuda", torch.bfloat16), block_size)
    x = torch.randn(5, 192, device="cuda", dtype=torch.bfloat16)
    assert ops.nf4_linear_plan(x, w).startswith("decode")
    exact, plain = ops.nf4_dequantize(w, torch.float32).double(), x @ ops.nf4_dequantize(w).t()
    assert_ratio(ops.nf4_linear(x, w), plain, x.double() @ exact.t())


@pytest.mark.gpu
def test_each_product_sees_what_the_one_before_wrote() -> None:
    """A launch starts while the kernel before ends; it must not read x before that is written."""
    w = ops.nf4_quantize((torch.randn(1024, 1024) / 32).to("cuda", torch.bfloat16))
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    hidden, outputs = x, []
    for _ in range(20):
        hidden = ops.nf4_linear(hidden, w)
        outputs.append(hidden)
    torch.cuda.synchronize()
    for before, after in zip([x, *outputs], outputs, strict=False):
        assert_exact(ops.nf4_linear(before, w), after)
        torch.cuda.synchronize()


def test_large_weight_goes_by_slabs_on_the_cpu() -> None:
    """More than one slab of rows, with blocks that straddle rows; slabs once began in the middle of a block."""
    w = ops.nf4_quantize(torch.randn(3000, 1000) / 30, block_size=64)
    x, dense = torch.randn(5, 1000), ops.nf4_dequantize(w)
    dy = torch.randn(5, 3000)
    assert_ratio(ops.nf4_linear(x, w), x @ dense.t(), x.double() @ dense.double().t())
    from fastpeft.ops import nf4

    parts = [(rows, slab.clone()) for rows, slab in nf4.row_slabs(w.operands, 3000, 1000, torch.float32)]
    assert len(parts) > 1
    assert_exact(torch.cat([slab for _, slab in parts]), dense)
    dx = torch.ops.fastpeft.nf4_linear_dx(dy, *w.operands, 3000, 1000)
    assert_ratio(dx, dy @ dense, dy.double() @ dense.double())


def test_non_contiguous_and_batched_x(device: str) -> None:
    w = ops.nf4_quantize(torch.randn(32, 64, device=device))
    x = torch.randn(64, 3, 5, device=device).permute(2, 1, 0)
    y = ops.nf4_linear(x, w)
    assert y.shape == (5, 3, 32)
    torch.testing.assert_close(y, x @ ops.nf4_dequantize(w).t())


def test_a_product_is_added_in_place(device: str) -> None:
    w = ops.nf4_quantize(torch.randn(64, 128, device=device))
    x, y = torch.randn(2, 3, 128, device=device), torch.randn(2, 3, 64, device=device)
    expected = y + ops.nf4_linear(x, w)
    assert ops.nf4_linear_add_(y, x, w) is y
    assert_exact(y, expected)
    with pytest.raises(ValueError, match=r"nf4_linear_add_: y is \(2, 3, 63\)"):
        ops.nf4_linear_add_(y[..., :63], x, w)
    with pytest.raises(ValueError, match=r"of torch\.float32"):
        ops.nf4_linear_add_(y.double(), x, w)


def test_gradient_against_finite_differences() -> None:
    w = ops.nf4_quantize(torch.randn(12, 64))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: ops.nf4_linear(x, w, bias), (x, bias))


def test_autocast_decides_the_dtype(device: str) -> None:
    w = ops.nf4_quantize(torch.randn(32, 64, device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.nf4_linear(torch.randn(2, 64, device=device), w).dtype == torch.bfloat16


def test_runs_are_equal_to_the_bit(device: str) -> None:
    w = ops.nf4_quantize(torch.randn(256, 256, device=device))
    x = torch.randn(33, 256, device=device, dtype=torch.bfloat16)
    assert_exact(ops.nf4_linear(x, w), ops.nf4_linear(x, w))


@pytest.mark.gpu
def test_other_stream_and_graph_capture() -> None:
    w = ops.nf4_quantize(torch.randn(256, 256, device="cuda"))
    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    expected = ops.nf4_linear(x, w)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = ops.nf4_linear(x, w)
    stream.synchronize()
    assert_exact(on_stream, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.nf4_linear(x, w)
    x.copy_(torch.randn_like(x))
    captured.fill_(float("nan"))
    graph.replay()
    assert_exact(captured, ops.nf4_linear(x, w))


# --- the framework's view ---
def test_opcheck(device: str) -> None:
    w = ops.nf4_quantize(torch.randn(32, 64, device=device))
    library = torch.ops.fastpeft
    torch.library.opcheck(library.nf4_quantize.default, (torch.randn(32, 64, device=device), 64))
    torch.library.opcheck(library.nf4_dequantize.default, (*w.operands, [32, 64], torch.bfloat16))
    torch.library.opcheck(library.nf4_linear.default, (torch.randn(2, 64, device=device), *w.operands, 32, 64, None))
    torch.library.opcheck(library.nf4_linear_dx.default, (torch.randn(2, 32, device=device), *w.operands, 32, 64))
    plain = ops.nf4_quantize(torch.randn(1000, device=device), double_quant=False)
    offset, nested_map = plain.absmax.mean(), ops.nf4_quantize(torch.randn(64, device=device)).nested_map
    torch.library.opcheck(library.nf4_quantize_scales.default, (plain.absmax, offset, nested_map))


def test_compiles_without_a_graph_break() -> None:
    w = ops.nf4_quantize(torch.randn(32, 64))
    compiled = torch.compile(lambda x: ops.nf4_linear(x, w).sin(), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64, requires_grad=True)
    torch.testing.assert_close(compiled(x), ops.nf4_linear(x, w).sin())
    compiled(x).sum().backward()
    assert x.grad is not None


# --- what it refuses ---
def test_errors_name_the_function_and_the_way_out() -> None:
    w = ops.nf4_quantize(torch.randn(32, 64))
    with pytest.raises(ValueError, match=r"nf4_quantize: block_size is 48; it must be one of 32, 64"):
        ops.nf4_quantize(torch.randn(64), block_size=48)
    with pytest.raises(ValueError, match=r"nf4_quantize: w is torch.float64"):
        ops.nf4_quantize(torch.randn(64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"nf4_linear: x has shape \(2, 63\); its last size must be in_features, 64"):
        ops.nf4_linear(torch.randn(2, 63), w)
    with pytest.raises(ValueError, match=r"nf4_linear: x is torch.int64"):
        ops.nf4_linear(torch.zeros(2, 64, dtype=torch.int64), w)
    with pytest.raises(ValueError, match=r"nf4_linear: bias has shape \(31,\); it must be \(32,\)"):
        ops.nf4_linear(torch.randn(2, 64), w, torch.randn(31))
    with pytest.raises(ValueError, match=r"codes has 5 elements; a weight of shape \(32, 64\)"):
        ops.NF4Weight(w.codes[:5], w.absmax, w.nested_absmax, w.nested_map, w.offset, (32, 64), 64, torch.float32)
    with pytest.raises(ValueError, match=r"no tensor 'layer.weight.absmax'"):
        state = w.state_dict("layer.")
        del state["layer.weight.absmax"]
        ops.NF4Weight.from_state_dict(state, "layer.")


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused() -> None:
    w = ops.nf4_quantize(torch.randn(32, 64, device="cuda"))
    with pytest.raises(ValueError, match=r"x is on cpu and the weight on cuda:0; move one of them"):
        ops.nf4_linear(torch.randn(2, 64), w)
