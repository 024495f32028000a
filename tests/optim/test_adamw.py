"""AdamW against torch's, over many steps, tensors, groups and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_exact, assert_optimizer, assert_ratio
from torch import Tensor

from fastpeft import ops
from fastpeft.optim import AdamW

SHAPES = [(3,), (64, 48), (1,), (1000, 7), (5, 5, 5), (0,)]


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


@pytest.mark.parametrize("maximize", [False, True])
def test_a_thousand_steps_follow_torch(maximize: bool, device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "maximize": maximize}
    first, second = AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(1000):
        gradients(ours, step)
        gradients(theirs, step)
        first.step()
        second.step()
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            assert_optimizer(p, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_parameters_are_rounded_once_from_float32_arithmetic(dtype: torch.dtype, device: str) -> None:
    params = parameters(device, dtype)
    reference = [p.detach().float() for p in params]
    gradients(params, 1)
    AdamW(params, lr=1e-2, weight_decay=0.1).step()
    for p, before in zip(params, reference, strict=True):
        if p.numel():
            assert p.grad is not None
            g = p.grad.double()
            exact = before.double() * (1 - 1e-3) - 1e-2 * g / (g.abs() + 1e-8)
            assert_ratio(p.detach(), exact.to(dtype), exact)


def test_groups_missing_gradients_and_lr_changes(device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    runs: list[tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]] = []
    for make, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        groups = [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "lr": 1e-4}]
        runs.append((make(groups, lr=1e-2, weight_decay=0.1), params))
    for step in range(20):
        for optimizer, params in runs:
            gradients(params, step)
            if step % 3 == 0:
                params[1].grad = None
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            assert_optimizer(p, q)


def test_more_tensors_than_one_launch_takes(device: str) -> None:
    params = [torch.nn.Parameter(torch.full((i % 5 + 1,), 1.0, device=device)) for i in range(1500)]
    for p in params:
        p.grad = torch.ones_like(p)
    AdamW(params, lr=0.5, weight_decay=0.0, eps=0.0).step()
    assert all(torch.allclose(p, torch.full_like(p, 0.5)) for p in params)


def test_state_is_float32_and_survives_a_round_trip(device: str) -> None:
    """torch's loader casts moments to the parameter's dtype; for bfloat16 that lost the second moment's small steps."""
    params = parameters(device, torch.bfloat16)
    optimizer = AdamW(params, lr=1e-2)
    gradients(params, 1)
    optimizer.step()
    clone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = AdamW(clone, lr=1e-2)
    restored.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, clone, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert restored.state[q][key].dtype == torch.float32
            assert_exact(restored.state[q][key], optimizer.state[p][key])
    for opt, ps in ((optimizer, params), (restored, clone)):
        gradients(ps, 2)
        opt.step()
    for p, q in zip(params, clone, strict=True):
        assert_exact(q.detach(), p.detach())


def test_opcheck(device: str) -> None:
    p, g, m, v = ([torch.rand(7, device=device), torch.rand(3, 3, device=device)] for _ in range(4))
    torch.library.opcheck(torch.ops.fastpeft.adamw_.default, (p, g, m, v, 1e-3, 0.9, 0.99, 1e-8, 0.1, 1, False))


@pytest.mark.gpu
def test_runs_on_the_callers_stream_and_in_a_graph() -> None:
    params = parameters("cuda")
    gradients(params, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    optimizer = AdamW(params, lr=1e-2)
    with torch.cuda.stream(stream):
        optimizer.step()
    stream.synchronize()
    expected = parameters("cuda")
    gradients(expected, 1)
    AdamW(expected, lr=1e-2).step()
    for p, q in zip(params, expected, strict=True):
        assert_exact(p.detach(), q.detach())


def test_errors() -> None:
    p: list[Tensor] = [torch.randn(4)]
    with pytest.raises(ValueError, match=r"AdamW: lr is -1; it must be 0 or more"):
        AdamW(p, lr=-1)
    with pytest.raises(ValueError, match=r"AdamW: betas are \(0.9, 1.0\)"):
        AdamW(p, betas=(0.9, 1.0))
    options: dict[str, Any] = {"lr": 1.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    with pytest.raises(ValueError, match=r"adamw_: a parameter of shape \(4,\) has a gradient of shape \(3,\)"):
        ops.adamw_(p, [torch.randn(3)], [torch.zeros(4)], [torch.zeros(4)], **options)
    with pytest.raises(ValueError, match=r"moments are torch.float64"):
        ops.adamw_(p, p, [torch.zeros(4).double()], [torch.zeros(4)], **options)
    with pytest.raises(ValueError, match=r"adamw: step is 0; the first step is 1"):
        ops.adamw_(p, p, [torch.zeros(4)], [torch.zeros(4)], **{**options, "step": 0})
    with pytest.raises(ValueError, match=r"adamw: dtype torch.int32 is not supported"):
        integers: list[Tensor] = [torch.zeros(4, dtype=torch.int32)]
        ops.adamw_(integers, integers, [torch.zeros(4)], [torch.zeros(4)], **options)
