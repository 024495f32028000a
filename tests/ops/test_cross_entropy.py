"""The head with its loss, and log-probabilities, against float64 formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_exact, assert_ratio
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft import ops
from fastpeft.ops import linear_loss

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Sizes on and off the 16-byte grid; on CUDA the last are rows that a cluster of two, four and eight blocks holds.
SHAPES = {"t37-k64-v96": (37, 64, 96), "t29-k40-v1003": (29, 40, 1003), "t64-k8-v2": (64, 8, 2)}
LONG_SHAPES = {
    "v10001": (9, 64, 10_001),
    "v49152": (11, 64, 49_152),
    "v128256": (6, 64, 128_256),
    "v256001": (5, 64, 256_001),
    "v700000": (3, 16, 700_000),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 2.0},
    "scaled": {"logit_scale": 0.25},
    "all": {"label_smoothing": 0.2, "softcap": 3.0, "logit_scale": 1.5},
}


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make(
    tokens: int, k: int, v: int, dtype: torch.dtype, device: str, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states, weight, targets of which every fourth is ignored, and a bias; logits are O(1)."""
    hidden = torch.randn(tokens, k, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(v, k, device=device) / k**0.5).to(dtype).requires_grad_()
    target = torch.randint(0, v, (tokens,), device=device)
    target[3::4] = -100
    return hidden, weight, target, torch.randn(v, device=device, dtype=dtype).requires_grad_() if bias else None


def plain_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits * logit_scale


def plain_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Plain torch, the loss from at least float32 as models compute it."""
    logits = plain_logits(hidden, weight, bias, softcap, logit_scale)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction=reduction)


def results(
    loss: Callable[..., Tensor], kind: torch.dtype, tensors: tuple[Any, ...], grad: Tensor | None = None
) -> list[Tensor]:
    """Output and gradients of a function of (hidden, weight, target, bias) in a dtype."""
    hidden, weight, target, bias = tensors
    leaves = [None if t is None else t.detach().to(kind).requires_grad_() for t in (hidden, weight, bias)]
    out = loss(leaves[0], leaves[1], target, leaves[2])
    out.backward(None if grad is None else grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def compare(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    tensors: tuple[Any, ...],
    grad: Tensor | None = None,
) -> None:
    dtype = tensors[0].dtype
    runs = (results(ours, dtype, tensors, grad), results(plain, dtype, tensors, grad))
    for got, same, exact in zip(*runs, results(plain, torch.float64, tensors, grad), strict=True):
        if got.dim() == 0:  # one number can be near by luck; the losses it is made of are compared elsewhere
            torch.testing.assert_close(got, exact.to(got.dtype), rtol=8 * torch.finfo(dtype).eps, atol=1e-6)
        else:
            assert_ratio(got, same.to(got.dtype), exact)


# --- values and gradients ---
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_loss_and_gradients(dtype: torch.dtype, shape: str, reduction: str, options: str, device: str) -> None:
    tensors = make(*SHAPES[shape], dtype, device, bias=shape == "t29-k40-v1003")
    grad = torch.randn(SHAPES[shape][0], device=device) if reduction == "none" else torch.tensor(0.75, device=device)
    given = {"reduction": reduction, **OPTIONS[options]}
    compare(
        lambda h, w, t, b: ops.linear_cross_entropy(h, w, t, b, **given),
        lambda h, w, t, b: plain_loss(h, w, t, b, **given),
        tensors,
        grad,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("hold", [True, False], ids=["held", "read-twice"])
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("shape", LONG_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_long_rows(dtype: torch.dtype, shape: str, options: str, hold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels, at every number of blocks a row."""
    if not hold:
        monkeypatch.setattr(linear_loss, "_holds_rows", lambda where: False)
    tensors = make(*LONG_SHAPES[shape], dtype, "cuda")
    compare(
        lambda h, w, t, b: ops.linear_cross_entropy(h, w, t, b, **OPTIONS[options]),
        lambda h, w, t, b: plain_loss(h, w, t, b, **OPTIONS[options]),
        tensors,
    )


@pytest.mark.parametrize("chunk_tokens", [7, 64, None])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_chunks(dtype: torch.dtype, reduction: str, chunk_tokens: int | None, device: str) -> None:
    """As near to float64 in many chunks as in one, though the weight's gradient is summed over them."""
    tensors = make(150, 48, 333, dtype, device, bias=True)
    grad = torch.randn(150, device=device) if reduction == "none" else None
    compare(
        lambda h, w, t, b: ops.linear_cross_entropy(h, w, t, b, reduction=reduction, chunk_tokens=chunk_tokens),
        lambda h, w, t, b: plain_loss(h, w, t, b, reduction=reduction),
        tensors,
        grad,
    )


def test_default_chunks_are_bounded_and_even() -> None:
    rows = lambda tokens, v: linear_loss.chunk_rows(tokens, 2 * v, "cuda")  # noqa: E731
    assert rows(8192, 128_256) == 2048  # 525 MB
    assert rows(9000, 128_256) == 1920  # five chunks, the last of 1320
    assert rows(4096, 49_152) == 4096
    assert rows(77, 128_256) == 77
    assert rows(10_000, 1 << 30) == 128


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_logprobs(dtype: torch.dtype, entropy: bool, device: str) -> None:
    tensors = make(37, 64, 1003, dtype, device, bias=True)
    given: dict[str, Any] = {"softcap": 4.0, "temperature": 0.7, "chunk_tokens": 16}

    def ours(h: Tensor, w: Tensor, t: Tensor, b: Tensor) -> Tensor:
        out = ops.linear_logprobs(h, w, t, b, entropy=entropy, **given)
        return out[0] if entropy else out

    def plain(h: Tensor, w: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return -plain_loss(h, w, t, b, reduction="none", softcap=4.0, logit_scale=1 / 0.7)

    compare(ours, plain, tensors, torch.randn(37, device=device))
    hidden, weight, target, bias = tensors
    assert_exact(ours(*tensors)[3::4].detach(), torch.zeros(9, device=device))
    if entropy:
        got = ops.linear_logprobs(hidden, weight, target, bias, entropy=True, **given)[1]
        assert not got.requires_grad

        def entropies(kind: torch.dtype) -> Tensor:
            logits = plain_logits(*(t.to(kind) for t in (hidden, weight, bias)), 4.0, 1 / 0.7)  # type: ignore[union-attr]
            logprobs = logits.to(torch.promote_types(kind, torch.float32)).log_softmax(-1)
            return torch.where(target == -100, 0.0, -(logprobs.exp() * logprobs).sum(-1))

        assert_ratio(got, entropies(dtype), entropies(torch.float64))


def test_a_row_worked_out_by_hand(device: str) -> None:
    """Logits (log 1, log 3): probabilities 1/4 and 3/4; entropy log 4 - 3/4 log 3; gradient (-3/4, 3/4) at target 0."""
    hidden = torch.ones(1, 1, device=device, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], device=device, requires_grad=True)
    target = torch.tensor([0], device=device)
    loss = ops.linear_cross_entropy(hidden, weight, target)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(4), rel=1e-6)
    assert weight.grad is not None and weight.grad.flatten().tolist() == pytest.approx([-0.75, 0.75], rel=1e-6)
    assert hidden.grad is not None and float(hidden.grad) == pytest.approx(0.75 * math.log(3), rel=1e-6)
    logprob, entropy = ops.linear_logprobs(hidden, weight, target, entropy=True)
    assert float(logprob.detach()) == pytest.approx(-math.log(4), rel=1e-6)
    assert float(entropy) == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradient_against_finite_differences(reduction: str, softcap: float | None) -> None:
    tensors = make(7, 5, 11, torch.float64, "cpu", bias=True)
    options: dict[str, Any] = {"softcap": softcap, "label_smoothing": 0.1, "logit_scale": 1.25, "chunk_tokens": 3}

    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.linear_cross_entropy(h, w, tensors[2], b, reduction=reduction, **options)  # type: ignore[arg-type]

    # A repeated backward computes its gradients another way than the first.
    assert torch.autograd.gradcheck(run, (tensors[0], tensors[1], tensors[3]), nondet_tol=1e-12)


# --- targets and divisors ---
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_all_ignored(dtype: torch.dtype, device: str) -> None:
    """As in torch the mean of nothing is NaN and the sum 0; gradients are zero, so one empty batch harms nothing."""
    hidden, weight, target, _ = make(6, 8, 20, dtype, device)
    target.fill_(-100)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0), ("none", 0.0)):
        hidden.grad = weight.grad = None
        loss = ops.linear_cross_entropy(hidden, weight, target, reduction=reduction)  # type: ignore[arg-type]
        loss.backward(torch.ones_like(loss))
        torch.testing.assert_close(loss.detach(), torch.full_like(loss, expected), equal_nan=True, rtol=0, atol=0)
        for leaf in (hidden, weight):
            assert leaf.grad is not None
            assert_exact(leaf.grad, torch.zeros_like(leaf))


def test_no_tokens(device: str) -> None:
    hidden, weight = torch.zeros(0, 8, device=device).requires_grad_(), torch.ones(5, 8, device=device).requires_grad_()
    target = torch.zeros(0, dtype=torch.int64, device=device)
    loss = ops.linear_cross_entropy(hidden, weight, target, reduction="sum")
    loss.backward()
    assert float(loss.detach()) == 0.0 and weight.grad is not None
    assert_exact(weight.grad, torch.zeros_like(weight))
    assert ops.linear_logprobs(hidden, weight, target).shape == (0,)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_num_items_divides_the_sum(dtype: torch.dtype, as_tensor: bool, device: str) -> None:
    tensors = make(20, 16, 50, dtype, device)
    items = torch.tensor(37, device=device) if as_tensor else 37
    for reduction in ("mean", "sum"):
        compare(
            lambda h, w, t, b, r=reduction: ops.linear_cross_entropy(h, w, t, b, reduction=r, num_items=items),  # type: ignore[misc]
            lambda h, w, t, b: plain_loss(h, w, t, b, reduction="sum") / 37,
            tensors,
        )


def test_a_bad_target(device: str) -> None:
    """Refused on the CPU; on CUDA, where nobody waits for the device, the loss and that row's gradient are NaN."""
    hidden, weight, target, _ = make(6, 8, 20, torch.float32, device)
    for bad in (20, -1, 2**40):
        target[1] = bad
        if device == "cpu":
            with pytest.raises(ValueError, match=f"target 1 is {bad}; it must be from 0 to 19, or -100 to be ignored"):
                ops.linear_cross_entropy(hidden, weight, target)
            continue
        hidden.grad = None
        losses = ops.linear_cross_entropy(hidden, weight, target, reduction="none")
        assert losses.isnan().nonzero().flatten().tolist() == [1]
        loss = ops.linear_cross_entropy(hidden, weight, target)
        loss.backward()
        assert loss.isnan() and hidden.grad is not None
        assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [1]


def test_another_ignore_index(device: str) -> None:
    hidden, weight, target, _ = make(8, 8, 20, torch.float32, device)
    moved = torch.where(target == -100, 7, torch.where(target == 7, 8, target))
    expected = ops.linear_cross_entropy(hidden, weight, torch.where(moved == 7, -100, moved))
    assert_exact(ops.linear_cross_entropy(hidden, weight, moved, ignore_index=7).detach(), expected.detach())


def test_a_masked_column_weighs_nothing(device: str) -> None:
    """A bias of -inf takes a column out of the vocabulary, in the loss, the entropy and the gradient."""
    hidden, weight, target, _ = make(12, 16, 40, torch.float32, device)
    target.clamp_(max=30)
    bias = torch.zeros(40, device=device)
    bias[35:] = -math.inf
    loss = ops.linear_cross_entropy(hidden, weight, target, bias)
    loss.backward()
    torch.testing.assert_close(loss, ops.linear_cross_entropy(hidden, weight[:35], target))
    assert weight.grad is not None
    assert_exact(weight.grad[35:], torch.zeros(5, 16, device=device))
    entropy = ops.linear_logprobs(hidden, weight, target, bias, entropy=True)[1]
    torch.testing.assert_close(entropy, ops.linear_logprobs(hidden, weight[:35], target, entropy=True)[1])


def test_small_gradients_survive_float16(device: str) -> None:
    """A token's share of a large mean lies below float16's range; it must not be rounded before it is summed."""
    hidden, weight, target, _ = make(64, 32, 80, torch.float16, device)
    scale = torch.tensor(2.0**20, device=device)  # of the loss
    for given in ({"num_items": 2**24}, {"reduction": "none"}):
        hidden.grad = weight.grad = None
        loss = ops.linear_cross_entropy(hidden, weight, target, **given)  # type: ignore[arg-type]
        (loss * scale if "num_items" in given else loss.sum() * (scale / 2**24)).backward()
        plain = lambda *t: plain_loss(*t, reduction="sum") * 2.0**-4  # noqa: E731
        same, exact = (results(plain, kind, (hidden, weight, target, None)) for kind in (torch.float16, torch.float64))
        for leaf, near, reference in zip((hidden, weight), same[1:], exact[1:], strict=True):
            assert leaf.grad is not None
            assert_ratio(leaf.grad, near, reference)


# --- how it is called ---
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained: str, reduction: str, device: str) -> None:
    hidden, weight, target, bias = make(9, 16, 30, torch.float32, device, bias=True)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    full = ops.linear_cross_entropy(hidden, weight, target, bias, reduction=reduction).sum()  # type: ignore[arg-type]
    expected = torch.autograd.grad(full, leaves[trained])[0]  # type: ignore[arg-type]
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)  # type: ignore[union-attr]
    ops.linear_cross_entropy(hidden, weight, target, bias, reduction=reduction).sum().backward()  # type: ignore[arg-type]
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name == trained)  # type: ignore[union-attr]
    assert_exact(leaves[trained].grad, expected)  # type: ignore[union-attr, arg-type]


def test_no_grad_makes_no_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(9, 16, 30, torch.float32, device)
    expected = ops.linear_cross_entropy(*tensors).detach()

    def refuse(*_: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(linear_loss._Gradients, "add", refuse)
    with torch.no_grad():
        loss = ops.linear_cross_entropy(*tensors)
        assert not ops.linear_logprobs(*tensors).requires_grad
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_backward_twice(dtype: torch.dtype, device: str) -> None:
    """The first backward gives its gradients away; a second over a retained graph computes them again."""
    hidden, weight, target, bias = make(40, 16, 30, dtype, device, bias=True)
    loss = ops.linear_cross_entropy(hidden, weight, target, bias, chunk_tokens=16)
    leaves = (hidden, weight, bias)
    grad = torch.tensor(3.0, device=device)
    first = torch.autograd.grad(loss, leaves, grad, retain_graph=True)  # type: ignore[arg-type]
    second = torch.autograd.grad(loss, leaves, grad)  # type: ignore[arg-type]
    exact = results(lambda *t: 3 * plain_loss(*t), torch.float64, (hidden, weight, target, bias))[1:]
    for a, b, reference in zip(first, second, exact, strict=True):
        assert_ratio(b, a, reference)


def test_accumulation_adds(device: str) -> None:
    hidden, weight, target, _ = make(9, 16, 30, torch.float32, device)
    ops.linear_cross_entropy(hidden, weight, target).backward()
    once = [leaf.grad.clone() for leaf in (hidden, weight)]  # type: ignore[union-attr]
    ops.linear_cross_entropy(hidden, weight, target).backward()
    for leaf, grad in zip((hidden, weight), once, strict=True):
        assert_exact(leaf.grad, 2 * grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool, device: str) -> None:
    hidden, weight, target, _ = make(9, 16, 30, torch.float32, device)
    expected = torch.autograd.grad(ops.linear_cross_entropy(hidden.sin(), weight, target), (hidden, weight))
    run = lambda h: ops.linear_cross_entropy(h.sin(), weight, target)  # noqa: E731
    checkpoint(run, hidden, use_reentrant=reentrant).backward()
    for leaf, grad in zip((hidden, weight), expected, strict=True):
        assert_exact(leaf.grad, grad)  # type: ignore[arg-type]


def test_batches_and_strides(device: str) -> None:
    """A shifted view of (b, t, k), as a causal model gives it, and a weight that is a transposed view."""
    states = torch.randn(2, 7, 16, device=device)
    weight = torch.randn(16, 30, device=device).t()
    target = torch.randint(0, 30, (2, 7), device=device)
    out = ops.linear_logprobs(states[:, :-1], weight, target[:, 1:])
    flat = ops.linear_logprobs(states[:, :-1].reshape(-1, 16), weight, target[:, 1:].reshape(-1))
    assert out.shape == (2, 6)
    assert_exact(out.reshape(-1), flat)
    columns = torch.randn(16, 12, device=device).t().requires_grad_()
    loss = ops.linear_cross_entropy(columns, weight, target.reshape(-1)[:12])
    loss.backward()
    reference = columns.detach().contiguous().requires_grad_()
    F.cross_entropy(reference @ weight.t(), target.reshape(-1)[:12]).backward()
    torch.testing.assert_close(columns.grad, reference.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_over_float32_masters(dtype: torch.dtype, device: str) -> None:
    """As plain torch under autocast; the gradient by a float32 weight is summed in float32 and never rounded."""
    hidden, weight, target, bias = make(90, 32, 70, torch.float32, device, bias=True)

    def under_autocast(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*tensors: Any) -> Tensor:
            with torch.autocast(device, dtype):
                return loss(*tensors)

        return run

    tensors = (hidden, weight, target, bias)
    ours = results(under_autocast(lambda *t: ops.linear_cross_entropy(*t, chunk_tokens=32)), torch.float32, tensors)
    same = results(under_autocast(plain_loss), torch.float32, tensors)
    for got, plain, exact in zip(ours, same, results(plain_loss, torch.float64, tensors), strict=True):
        assert got.dtype == torch.float32
        assert_ratio(got, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_equal_calls_give_equal_bits(dtype: torch.dtype, device: str) -> None:
    tensors = make(150, 64, 20_003 if device == "cuda" else 1003, dtype, device)
    for loss in (
        lambda *t: ops.linear_cross_entropy(*t, chunk_tokens=64),
        lambda *t: ops.linear_logprobs(*t, chunk_tokens=64).sum(),
    ):
        for a, b in zip(results(loss, dtype, tensors), results(loss, dtype, tensors), strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction: str, device: str) -> None:
    hidden, weight, target, bias = make(20, 16, 30, torch.float32, device, bias=True)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.linear_cross_entropy(h.sin(), w, target, b, reduction=reduction, chunk_tokens=8).sum()  # type: ignore[arg-type]

    leaves = (hidden, weight, bias)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))  # type: ignore[arg-type]
    grads = torch.autograd.grad(2 * compiled(*leaves), leaves)  # type: ignore[arg-type]
    for got, expected in zip(grads, torch.autograd.grad(2 * loss(*leaves), leaves), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    hidden, weight, target, bias = (
        None if t is None else t.detach() for t in make(6, 16, 30, dtype, device, bias=True)
    )
    operands, options = (hidden, weight, bias, target), (-100, 0.1, 5.0, 1.0, 4)
    library, one = torch.ops.fastpeft, torch.ones((), device=device)
    torch.library.opcheck(library.linear_loss.default, (*operands, *options, True))
    torch.library.opcheck(library.linear_loss_grads.default, (*operands, one * 3, *options, True, True, True))
    torch.library.opcheck(library.linear_loss_grads.default, (*operands, None, *options, True, False, False))
    losses, lse, _ = library.linear_loss(*operands, *options, False)
    arguments = (torch.ones_like(losses), lse, *operands, *options, True, True, True)
    torch.library.opcheck(library.linear_loss_backward.default, arguments)
    torch.library.opcheck(library.scale_.default, (hidden, one * 2, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("numel", [1, 7, 4099])
def test_scale(dtype: torch.dtype, numel: int, device: str) -> None:
    """In place, one rounding; by 1 nothing changes, and a divisor of 0 gives 0."""
    x = torch.randn(numel + 1, device=device, dtype=dtype)
    of = lambda value: torch.tensor(value, device=device)  # noqa: E731
    for start in (0, 1):  # on and off the 16-byte grid
        for factor, divisor, expected in ((0.3, None, 0.3), (1.0, None, 1.0), (3.0, 4.0, 0.75), (1.0, 0.0, 0.0)):
            y = x.clone()[start:]
            torch.ops.fastpeft.scale_(y, of(factor), None if divisor is None else of(divisor))
            assert_exact(y, (x[start:].float() * expected).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_a_cuda_graph(reduction: str) -> None:
    """Nothing waits for the device, and a replay reads what is in the inputs then."""
    hidden, weight, target, _ = make(256, 64, 20_000, torch.bfloat16, "cuda")
    run = lambda: torch.autograd.grad(  # noqa: E731
        ops.linear_cross_entropy(hidden, weight, target, reduction=reduction).sum(), (hidden, weight)
    )
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            grads = run()
        with torch.no_grad():
            hidden.normal_()
            target.random_(0, 20_000)
        graph.replay()
        for got, expected in zip(grads, run(), strict=True):
            assert_exact(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_memory_beyond_the_inputs_is_under_a_gigabyte(trainable: bool) -> None:
    """At 8192 x 4096 x 128256, where the logits are 2.1 GB; of a trainable head its gradient comes on top."""
    hidden = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(128_256, 4096, device="cuda", dtype=torch.bfloat16).mul_(4096**-0.5).requires_grad_(trainable)
    target = torch.randint(0, 128_256, (8192,), device="cuda")
    for reduction in ("mean", "none"):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.linear_cross_entropy(hidden, weight, target, reduction=reduction).sum().backward()  # type: ignore[arg-type]
        torch.cuda.synchronize()
        beyond = torch.cuda.max_memory_allocated() - before
        assert beyond < 1e9 + (weight.nbytes if trainable else 0), f"{beyond / 1e9:.2f} GB"


# --- errors ---
def test_errors_name_the_function_and_the_way_out() -> None:
    hidden, weight, target = torch.randn(4, 8), torch.randn(10, 8), torch.zeros(4, dtype=torch.int64)
    call = ops.linear_cross_entropy
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: call(hidden[:, 1:], weight, target), r"hidden has shape \(4, 7\); a weight of \(10, 8\) needs"),
        (lambda: call(hidden, weight[0], target), r"weight has shape \(8,\); it must be \(v, k\)"),
        (lambda: call(hidden, weight, target[1:]), r"target has shape \(3,\); .* needs \(4,\)"),
        (lambda: call(hidden, weight, target.int()), r"target is torch.int32; it must be int64"),
        (lambda: call(hidden, weight, target, weight[:3, 0]), r"bias has shape \(3,\); it must be \(10,\)"),
        (lambda: call(hidden, weight.half(), target), r"hidden is torch.float32 and weight torch.float16; cast one"),
        (lambda: call(hidden, weight.to("meta"), target), r"tensors are on cpu, meta; move them together"),
        (lambda: call(hidden, weight, target, label_smoothing=1.5), r"label_smoothing is 1.5; it must be from 0 to 1"),
        (lambda: call(hidden, weight, target, reduction="avg"), r"reduction is 'avg'; it must be"),  # type: ignore[arg-type]
        (lambda: call(hidden, weight, target, reduction="none", num_items=3), r"num_items divides a sum"),
        (lambda: call(hidden, weight, target, num_items=0), r"num_items is 0; it must be positive"),
        (lambda: call(hidden, weight, target, num_items=target), r"num_items has shape \(4,\); it must be one number"),
        (lambda: call(hidden, weight, target, softcap=0.0), r"softcap is 0.0; it must be positive"),
        (lambda: call(hidden, weight, target, chunk_tokens=0), r"chunk_tokens is 0; it must be at least 1"),
        (lambda: call(hidden, weight, target, logit_scale=math.inf), r"logit_scale is inf; it must be finite"),
    ]
    for run, message in cases:
        with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
            run()
    with pytest.raises(ValueError, match=r"linear_logprobs: temperature is 0.0; it must be positive"):
        ops.linear_logprobs(hidden, weight, target, temperature=0.0)
