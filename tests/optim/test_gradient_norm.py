"""Clipping fused into the step, and what a gradient that is not finite does, with a scaler and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.problems import FAMILY, assert_same_bits, gradients, parameters, run
from tolerances import assert_optimizer

from fastpeft.optim import AdamW

MAX_NORM = 0.7


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["clipped", "below the norm"])
def test_clipping_is_that_of_torch(scale: float, device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    first = AdamW(ours, lr=1e-2, max_grad_norm=MAX_NORM, eps=1e-6)
    second = torch.optim.AdamW(theirs, lr=1e-2, eps=1e-6)
    for step in range(10):
        gradients(ours, step, scale)
        gradients(theirs, step, scale)
        kept = [p.grad.clone() for p in ours if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(theirs, MAX_NORM)
        first.step()
        second.step()
        assert first.grad_norm is not None
        assert float(first.grad_norm) == pytest.approx(float(norm), rel=1e-5)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, kept, strict=True) if p.grad is not None)
    assert first.skipped_steps == 0
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            assert_optimizer(p, q)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", FAMILY)
def test_a_step_with_a_gradient_that_is_not_finite_never_was(make: Any, bad: float, device: str) -> None:
    ours, expected = parameters(device), parameters(device)
    first, second = make(ours, lr=1e-2, max_grad_norm=MAX_NORM), make(expected, lr=1e-2, max_grad_norm=MAX_NORM)
    for step in range(6):
        gradients(ours, step)
        if step == 3:
            assert ours[3].grad is not None
            ours[3].grad.view(-1)[-1] = bad
        first.step()
    run(second, expected, [0, 1, 2, 4, 5])
    assert first.skipped_steps == 1 and second.skipped_steps == 0
    assert_same_bits(ours, expected)
    assert float(first.state_dict()["state"][0]["step"]) == 5


def test_without_a_norm_nothing_is_measured(device: str) -> None:
    params = parameters(device)
    optimizer = AdamW(params)
    run(optimizer, params, range(2))
    assert optimizer.grad_norm is None and optimizer.skipped_steps == 0


def test_a_norm_that_is_given_up_leaves_nothing_behind(device: str) -> None:
    ours, expected = parameters(device), parameters(device)
    first, second = AdamW(ours, lr=1e-2), AdamW(expected, lr=1e-2)
    first.max_grad_norm = MAX_NORM
    gradients(ours, 0)
    ours[0].grad = torch.full_like(ours[0], float("nan"))
    first.step()  # skipped
    first.max_grad_norm = None
    run(first, ours, range(3))
    run(second, expected, range(3))
    assert_same_bits(ours, expected)


@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled by hand"])
@pytest.mark.parametrize("clip", [None, MAX_NORM], ids=["no clipping", "clipping"])
def test_with_a_scaler(clip: float | None, unscaled: bool, device: str) -> None:
    """Against torch's fused AdamW, which takes part in the same way; step 3 overflows."""
    ours, theirs = parameters(device), parameters(device)
    first = AdamW(ours, lr=1e-2, max_grad_norm=clip)
    second = torch.optim.AdamW(theirs, lr=1e-2)
    for optimizer, params in ((first, ours), (second, theirs)):
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2)
        for step in range(8):
            scale = float(scaler.scale(torch.ones((), device=device)))
            gradients(params, step, scale)
            if step == 3:
                assert params[1].grad is not None
                params[1].grad[0, 0] = float("inf")
            if optimizer is second:
                scaler.unscale_(second)
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(params, clip)
            elif unscaled:
                scaler.unscale_(first)
            scaler.step(optimizer)
            scaler.update()
    assert first.skipped_steps == 1
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            assert_optimizer(p, q)
    assert not hasattr(first, "grad_scale")


def test_the_norm_of_parameters_on_two_devices_is_refused() -> None:
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device="meta"))]
    with pytest.raises(ValueError, match=r"AdamW: max_grad_norm with parameters on cpu and meta"):
        AdamW(params, max_grad_norm=1.0)
