"""Dense products of rows sorted by expert: against float64, with gradients of both sides, and odd sizes."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_ratio
from torch import Tensor

from fastpeft.ops.linear_experts import linear_experts

COUNTS = {"even": [5, 5, 5], "some-empty": [0, 7, 0], "none": [0, 0, 0], "one": [0, 0, 1]}


def one_by_one(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    parts = [0, *ends.tolist()]
    return torch.cat([x[b:e] @ weight.t() for b, e, weight in zip(parts, parts[1:], w, strict=False)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(24, 32), (3, 32), (24, 5), (7, 3)], ids=lambda n: str(n))
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products_and_gradients(counts: list[int], n: int, k: int, dtype: torch.dtype, device: str) -> None:
    ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)
    rows = int(ends[-1])
    x = torch.randn(rows, k).to(device, dtype).requires_grad_()
    w = (torch.randn(3, n, k) / k**0.5).to(device).requires_grad_()  # float32, as adapters are
    dy = torch.randn(rows, n).to(device, dtype)

    def results(product: object, x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
        y = product(x, w, ends)  # type: ignore[operator]
        return [y, *torch.autograd.grad(y, (x, w), dy)]

    def in_dtype(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        return one_by_one(x, w.to(x.dtype), ends)

    found, plain = results(linear_experts, x, w, dy), results(in_dtype, x, w, dy)
    exact = results(one_by_one, *(t.detach().double().requires_grad_() for t in (x, w)), dy.double())
    for out, ordinary, reference in zip(found, plain, exact, strict=True):
        assert_ratio(out, ordinary, reference)


def test_what_does_not_fit_is_refused() -> None:
    x, w, ends = torch.randn(4, 8), torch.randn(3, 5, 8), torch.tensor([1, 2, 4], dtype=torch.int32)
    assert linear_experts(x, w, ends).shape == (4, 5)
    for arguments in ((x[:, :7], w, ends), (x, w[0], ends), (x, w, ends[:2]), (x[0], w, ends)):
        with pytest.raises(ValueError, match="linear_experts: x is"):
            linear_experts(*arguments)
