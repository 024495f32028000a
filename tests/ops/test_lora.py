"""LoRA linear over a dense or an NF4 base, with dropout; and the dropout op itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_exact, assert_ratio
from torch import Tensor

from fastpeft import ops
from fastpeft.ops.dropout import new_seed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.ops.fastpeft.dropout(x, p, seed)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Layers:
    """Layers of one input and rank, and what comes in from either side."""

    x: Tensor
    weights: list[Tensor | ops.NF4Weight]
    a: list[Tensor]
    b: list[Tensor]
    biases: list[Tensor]
    dys: list[Tensor]
    dropout: float
    scales: list[float]

    @classmethod
    def make(
        cls, m: int, n: tuple[int, ...], k: int, rank: int, dropout: float, dtype: torch.dtype, base: str, device: str
    ) -> Layers:
        dense = [(torch.randn(size, k) / k**0.5).to(device, dtype) for size in n]
        return cls(
            torch.randn(m, k, device=device, dtype=dtype).requires_grad_(),
            [ops.nf4_quantize(w) if base == "nf4" else w for w in dense],
            [(torch.randn(rank, k, device=device) / k**0.5).requires_grad_() for _ in n],
            [(torch.randn(size, rank, device=device) / rank**0.5).requires_grad_() for size in n],
            [torch.randn(size, device=device, dtype=dtype) for size in n],
            [torch.randn(m, size, device=device, dtype=dtype) / size**0.5 for size in n],
            dropout,
            [2.0 + i for i in range(len(n))],
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.a, *self.b]

    def together(self) -> list[Tensor]:
        lists = (self.weights, self.a, self.b, self.scales, self.biases)
        return ops.lora_linear_group(self.x, *lists, dropout=self.dropout)

    def one_by_one(self) -> list[Tensor]:
        """All with the mask that they have together."""
        state, out = torch.get_rng_state(), []
        for w, a, b, scale, bias in zip(self.weights, self.a, self.b, self.scales, self.biases, strict=True):
            torch.set_rng_state(state)
            out.append(ops.lora_linear(self.x, w, a, b, scale, bias, self.dropout))
        return out

    def outputs_and_gradients(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Under one seed, of the CPU alone: that of CUDA cannot be set while a graph is captured."""
        torch.default_generator.manual_seed(7)
        ys = run()
        return [*ys, *torch.autograd.grad(ys, self.leaves, self.dys)]

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        """In the framework's products, with the mask that the dropout op has for the same seed."""
        mask = torch.ones_like(self.x, dtype=torch.float32)
        torch.default_generator.manual_seed(7)
        mask = (drop(mask, self.dropout, new_seed()) if self.dropout else mask).to(dtype)
        count = len(self.weights)
        x, *factors = (leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves)
        ys = []
        for w, a, b, scale, bias in zip(
            self.weights, factors[:count], factors[count:], self.scales, self.biases, strict=True
        ):
            dense = ops.nf4_dequantize(w) if isinstance(w, ops.NF4Weight) else w
            y = x @ dense.to(dtype).t() + bias.to(dtype)
            ys.append(y + scale * ((x * mask) @ a.t()) @ b.t())
        grads = torch.autograd.grad(ys, [x, *factors], [dy.to(dtype) for dy in self.dys])
        return [*ys, *grads]

    def check(self, run: Callable[[], list[Tensor]]) -> None:
        ours, dtype = self.outputs_and_gradients(run), self.x.dtype
        assert all(grad.dtype == torch.float32 for grad in ours[len(self.weights) + 1 :])
        for value, same, exact in zip(ours, self.plain(dtype), self.plain(torch.float64), strict=True):
            assert_ratio(value.to(dtype), same, exact)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward_and_backward(dtype: torch.dtype, rank: int, dropout: float, base: str, device: str) -> None:
    layer = Layers.make(37, (96,), 160, rank, dropout, dtype, base, device)
    layer.check(layer.one_by_one)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_group(dtype: torch.dtype, rank: int, dropout: float, base: str, device: str) -> None:
    layers = Layers.make(37, (96, 64, 32), 160, rank, dropout, dtype, base, device)
    layers.check(layers.together)


def test_group_is_its_layers_one_by_one(device: str) -> None:
    """Outputs and each layer's own gradients to the bit; x's gradient is a sum, whose roundings have another order."""
    layers = Layers.make(37, (96, 64), 128, 4, 0.3, torch.float32, "nf4", device)
    both = zip(*(layers.outputs_and_gradients(run) for run in (layers.together, layers.one_by_one)), strict=True)
    for i, (grouped, alone) in enumerate(both):
        if i == len(layers.weights):
            torch.testing.assert_close(grouped, alone)
        else:
            assert_exact(grouped, alone)


def test_group_of_different_ranks_and_bases() -> None:
    layers = Layers.make(9, (96, 64), 128, 4, 0.0, torch.float32, "nf4", "cpu")
    layers.weights[1] = ops.nf4_dequantize(layers.weights[1])  # type: ignore[arg-type]
    layers.a[1] = torch.randn(11, 128).div_(128**0.5).requires_grad_()
    layers.b[1] = torch.randn(64, 11).requires_grad_()
    layers.check(layers.together)


def test_group_with_an_output_that_nobody_reads(device: str) -> None:
    layers = Layers.make(9, (96, 64), 128, 4, 0.0, torch.float32, "nf4", device)
    first, _ = layers.together()
    grads = torch.autograd.grad(first, [layers.x, layers.a[1], layers.b[1]], layers.dys[0])
    assert not grads[1].any() and not grads[2].any() and grads[0].any()


def test_only_what_is_asked_for_has_a_gradient(device: str) -> None:
    layers = Layers.make(9, (96, 64), 128, 4, 0.3, torch.float32, "nf4", device)
    everything = layers.outputs_and_gradients(layers.together)[2:]
    for i, leaf in enumerate(layers.leaves):
        for other in layers.leaves:
            other.requires_grad_(other is leaf)
        torch.manual_seed(7)
        (grad,) = torch.autograd.grad(layers.together(), leaf, layers.dys)
        assert_exact(grad, everything[i])


def test_gradient_against_finite_differences() -> None:
    """The seed is drawn anew in every call, so the generator is reset for each."""
    w = ops.nf4_quantize(torch.randn(10, 64))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    a = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    b = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(10, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(5)
        return ops.lora_linear(x, w, a, b, 0.5, bias, dropout=0.25)

    assert torch.autograd.gradcheck(run, (x, a, b, bias))


def test_evaluation_has_no_dropout(device: str) -> None:
    x, a, b = (torch.randn(*s, device=device) for s in ((4, 64), (2, 64), (8, 2)))
    w = torch.randn(8, 64, device=device)
    assert_exact(
        ops.lora_linear(x, w, a, b, 1.0, dropout=0.5, training=False), ops.lora_linear(x, w, a, b, 1.0, dropout=0.0)
    )


def test_nothing_but_x_and_its_projection_is_kept() -> None:
    """Neither the dropped x nor a mask is saved: of the big saved tensors there is x alone."""
    x = torch.randn(64, 128, requires_grad=True)
    w = ops.nf4_quantize(torch.randn(32, 128))
    a, b = torch.randn(4, 128, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        ops.lora_linear(x, w, a, b, 1.0, dropout=0.5)
    assert [tuple(t.shape) for t in saved if t.numel() >= x.numel()] == [(64, 128)]


@pytest.mark.gpu
def test_nothing_is_kept_without_gradients() -> None:
    layers = Layers.make(300, (96, 64), 128, 4, 0.3, torch.bfloat16, "nf4", "cuda")
    with torch.no_grad():
        layers.together()
        before = torch.cuda.memory_allocated()
        ys = layers.together()
        assert torch.cuda.memory_allocated() - before <= sum(y.nbytes + 512 for y in ys)


def test_checkpointing_draws_the_same_mask(device: str) -> None:
    """Recomputation restores the CPU generator, from which the seed comes."""
    from torch.utils.checkpoint import checkpoint

    w = torch.randn(8, 64, device=device)
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(11)
        x = torch.linspace(-1, 1, 256, device=device).reshape(4, 64).requires_grad_()
        a = torch.full((2, 64), 0.1, device=device, requires_grad=True)
        b = torch.ones(8, 2, device=device, requires_grad=True)
        call = lambda x, a=a, b=b: ops.lora_linear(x, w, a, b, 1.0, dropout=0.5)  # noqa: E731
        (checkpoint(call, x, use_reentrant=False) if wrapped else call(x)).sum().backward()
        grads.append((x.grad, a.grad, b.grad))
    for plain, recomputed in zip(*grads, strict=True):
        assert_exact(recomputed, plain)


# --- dropout ---
def philox(column_call: int, row_call: int, key: int) -> list[int]:
    """Philox4x32-7 as the paper has it, in Python's integers."""
    word = 0xFFFFFFFF
    c0, c1, c2, c3, k0, k1 = column_call, row_call, 0, 0, key & word, key >> 32
    for _ in range(7):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & word, (first >> 32) ^ c3 ^ k1, first & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return [c0, c1, c2, c3]


def test_philox_known_answer() -> None:
    """Counter 0, key 0 gives 5f6fb709 0d893f64 4f121f81 4f730a48 (Random123's published vector for seven rounds).

    Their halves, of 15 bits each, for columns 0 and 1: 0.430 0.746, 0.495 0.106, 0.246 0.618, 0.080 0.621 in rows 0, 1,
    8 and 9; turned by a byte, in rows 16, 17, 24 and 25: 0.873 0.073, 0.072 0.782, 0.142 0.010, 0.899 0.565.
    """
    assert philox(0, 0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    kept = drop(torch.ones(26, 2), 0.5, torch.tensor(0)) != 0
    assert kept[[0, 1, 8, 9]].tolist() == [[False, True], [False, False], [False, True], [False, True]]
    assert kept[[16, 17, 24, 25]].tolist() == [[True, False], [False, True], [False, False], [True, True]]
    kept = drop(torch.ones(26, 2), 0.45, torch.tensor(0)) != 0
    assert kept[[0, 1, 8, 9], 0].tolist() == [False, True, False, False]


@pytest.mark.parametrize("shape", [(37, 53), (16, 16), (1, 100), (33, 1)], ids=str)
def test_dropout_mask_is_the_documented_one(shape: tuple[int, int], device: str) -> None:
    p, seed = 0.3, 2**61 + 12345
    threshold = round(p * 32768)
    kept = drop(torch.ones(shape, device=device), p, torch.tensor(seed)).cpu() != 0
    for i in range(shape[0]):
        for j in range(shape[1]):
            word = philox(j // 2, i // 32 * 4 + i % 8 // 2, seed)[i % 16 // 8 * 2 + i % 2]
            turned = word >> 8 | (word & 0xFF) << 24 if i % 32 >= 16 else word
            bits = turned >> (16 * (j % 2)) & 0x7FFF
            assert bool(kept[i, j]) == (bits >= threshold), (i, j)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(331, 302), (100_003,), (7, 5, 2857)], ids=str)
def test_dropout_keeps_its_share_and_its_mean(shape: tuple[int, ...], p: float, device: str) -> None:
    """What is kept is scaled by the share that the mask's 15 bits can give, which p is rounded to."""
    rounded = round(p * 32768) / 32768
    out = drop(torch.ones(shape, device=device), p, torch.tensor(99))
    kept = out != 0
    assert abs(float(kept.double().mean()) - (1 - rounded)) < 7 * (p * (1 - p) / out.numel()) ** 0.5
    assert_exact(out[kept], torch.full_like(out[kept], 1 / (1 - rounded)))


def test_dropout_of_neighbours_is_independent() -> None:
    """Of elements that share a call, a word, a row or a column, and of two seeds: correlations of plain noise."""
    size, p = 512, 0.4
    first, other = (drop(torch.ones(size, size), p, torch.tensor(seed)) != 0 for seed in (5, 6))
    first, other = first.double() - (1 - p), other.double() - (1 - p)
    for rows, columns in [
        (0, 1),
        (1, 0),
        (0, 8),
        (8, 0),
        (1, 1),
        (8, 1),
        (9, 1),
        (0, 16),
        (16, 0),
        (16, 1),
        (32, 0),
        (3, 5),
    ]:
        product = first[: size - rows, : size - columns] * first[rows:, columns:]
        assert abs(float(product.mean())) < 7 * p * (1 - p) / product.numel() ** 0.5, (rows, columns)
    assert abs(float((first * other).mean())) < 7 * p * (1 - p) / size


@pytest.mark.parametrize("p", [0.999999, 1e-7])
def test_dropout_at_the_ends(p: float) -> None:
    """Rounded to what 15 bits can say: never to all, and to none where the share is that small."""
    out = drop(torch.ones(1024, 1024), p, torch.tensor(1))
    kept = out != 0
    assert 0 < int(kept.sum()) < 200 if p > 0.5 else bool(kept.all())
    assert bool(out.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (1025,), (17, 24), (40, 13), (3, 5, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dropout_is_the_same_on_both_devices(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    x, seed = torch.randn(numel + 1).to(dtype), torch.tensor(2**62 + 17)
    for part in (slice(0, numel), slice(1, numel + 1)):  # on the 16-byte grid and off it
        on_cpu = x[part].reshape(shape)
        assert_exact(drop(x.cuda()[part].reshape(shape), 0.4, seed), drop(on_cpu, 0.4, seed))


# --- the framework's view ---
def test_opcheck(device: str) -> None:
    layers = Layers.make(4, (8, 16), 64, 3, 0.5, torch.float32, "nf4", device)
    x, a, b = layers.x.detach(), [t.detach() for t in layers.a], [t.detach() for t in layers.b]
    bases = [*layers.weights[0].operands[:-1], ops.nf4_dequantize(layers.weights[1]), *[None] * 4]  # type: ignore[union-attr, arg-type]
    rest = (bases, [64, 0], [8, 16], 64, a, b, [2.0, 3.0], 0.5, torch.tensor(3))
    library = torch.ops.fastpeft
    torch.library.opcheck(library.dropout.default, (x, 0.5, torch.tensor(3)))
    torch.library.opcheck(library.lora_linear.default, (x, *rest, [None, layers.biases[1]]))
    *ys, xa = library.lora_linear(x, *rest, [None, layers.biases[1]])
    torch.library.opcheck(library.lora_linear_backward.default, (ys, x, xa, *rest, True, True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_a_graph_break(dropout: float, device: str) -> None:
    layers = Layers.make(5, (32, 16), 64, 3, dropout, torch.float32, "nf4", device)
    compiled = torch.compile(layers.together, fullgraph=True, backend="aot_eager")
    both = zip(*(layers.outputs_and_gradients(run) for run in (compiled, layers.together)), strict=True)
    for value, reference in both:
        torch.testing.assert_close(value, reference)
    single = torch.compile(
        lambda: [ops.lora_linear(layers.x, layers.weights[0], layers.a[0], layers.b[0], 2.0, None, dropout)],
        fullgraph=True,
        backend="aot_eager",
    )
    torch.autograd.grad(single(), (layers.x, layers.a[0]), layers.dys[:1])


def test_errors_name_the_function_and_the_way_out() -> None:
    x, w = torch.randn(4, 64), torch.randn(8, 64)
    a, b = torch.randn(2, 64), torch.randn(8, 2)
    with pytest.raises(ValueError, match=r"lora_linear: a has shape \(2, 64\) and b \(8, 3\); .* needs \(r, 64\)"):
        ops.lora_linear(x, w, a, torch.randn(8, 3), 1.0)
    with pytest.raises(ValueError, match=r"lora_linear_group: a has shape \(2, 64\) and b \(9, 2\)"):
        ops.lora_linear_group(x, [w, w], [a, a], [b, torch.randn(9, 2)], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"lora_linear_group: got 2 weights, 1 a, 2 b, 2 scales and 2 biases"):
        ops.lora_linear_group(x, [w, w], [a], [b, b], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"lora_linear: dropout is 1.0; it must be at least 0 and below 1"):
        ops.lora_linear(x, w, a, b, 1.0, dropout=1.0)
    with pytest.raises(ValueError, match=r"lora_linear: x has shape \(4, 63\)"):
        ops.lora_linear(x[:, 1:], w, a, b, 1.0)
