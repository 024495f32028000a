"""8-bit state: how it is kept, and that training with it ends where training with 32 bits does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.problems import BIG_SHAPES, assert_same_bits, gradients, parameters, run
from torch import Tensor, nn

from fastpeft.optim import AdamW, AdamW8bit, PagedAdamW8bit

BOTH = [AdamW8bit, PagedAdamW8bit]


@pytest.mark.parametrize("make", BOTH)
def test_small_parameters_keep_32_bits(make: Any, device: str) -> None:
    params = parameters(device, shapes=BIG_SHAPES)
    optimizer = make(params)
    run(optimizer, params, [0])
    entries = optimizer.state_dict()["state"]
    assert [entries[i]["state1"].dtype for i in range(4)] == [torch.uint8, torch.float32, torch.uint8, torch.uint8]
    assert [tuple(entries[i]["state2"].shape) for i in range(4)] == BIG_SHAPES
    assert [entries[i]["absmax1"].numel() for i in (0, 2, 3)] == [83, 16, 17]
    run(make(params, min_8bit_size=10**9), params, [0])


def test_it_takes_two_bytes_a_parameter(device: str) -> None:
    param = nn.Parameter(torch.randn(1 << 20, device=device))
    optimizer = AdamW8bit([param])
    run(optimizer, [param], [0])
    assert sum(optimizer.memory().values()) == 2 * (1 << 20) + 8 * (1 << 12) + 4
    plain = AdamW([param])
    run(plain, [param], [0])
    assert sum(plain.memory().values()) == 8 * (1 << 20) + 4


@pytest.mark.parametrize("make", BOTH)
def test_one_step_is_that_of_32_bits(make: Any, device: str) -> None:
    """The update uses the moments as they are before they are rounded to codes; on a GPU with a root less exact."""
    eight, thirty_two = parameters(device, shapes=BIG_SHAPES), parameters(device, shapes=BIG_SHAPES)
    run(make(eight, lr=1e-2), eight, [0])
    run(AdamW(thirty_two, lr=1e-2), thirty_two, [0])
    if device == "cpu":
        assert_same_bits(eight, thirty_two)
    for one, other in zip(eight, thirty_two, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-7, atol=1e-8)


def _final_loss(make: Any, seed: int, device: str) -> float:
    """A small classifier of points by which of a random teacher's outputs is the largest, on points not seen."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    teacher = drawn(32, 64), drawn(64, 8)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 8)).to(device)
    optimizer = make(model.parameters(), lr=5e-3, weight_decay=0.05)

    def loss_of(count: int) -> Tensor:
        x = drawn(count, 32)
        labels = (torch.tanh(x @ teacher[0] / 6) @ teacher[1]).argmax(dim=1)
        return nn.functional.cross_entropy(model(x), labels)

    for _ in range(100):
        optimizer.zero_grad()
        loss_of(64).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss_of(4096))


def test_training_ends_where_32_bits_end(device: str) -> None:
    """The mean over four runs differs by less than what seeds make of it."""
    losses = {make: torch.tensor([_final_loss(make, seed, device) for seed in range(4)]) for make in (AdamW, AdamW8bit)}
    difference = (losses[AdamW8bit] - losses[AdamW]).mean().abs()
    noise = losses[AdamW].std()
    assert losses[AdamW].mean() < 1.2, "the problem is learnt"
    assert difference < noise, f"{losses}"
    assert difference < 0.05 * losses[AdamW].mean(), f"{losses}"


def test_clipping_and_rounding_at_random(device: str) -> None:
    runs = [parameters(device, torch.bfloat16, BIG_SHAPES) for _ in range(2)]
    for params in runs:
        optimizer = AdamW8bit(params, lr=1e-3, max_grad_norm=1.0, stochastic_rounding=True)
        run(optimizer, params, range(4))
        gradients(params, 4)
    assert_same_bits(*runs)
