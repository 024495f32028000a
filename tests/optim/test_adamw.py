"""AdamW against torch's, over many steps, tensors, groups and dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim.problems import FAMILY, assert_same_bits, gradients, parameters, run
from tolerances import assert_exact, assert_optimizer, assert_ratio
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.optim import AdamW, PagedAdamW


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_thousand_steps_follow_torch(maximize: bool, steps: int, device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "maximize": maximize}
    run(AdamW(ours, **options), ours, range(steps))
    run(torch.optim.AdamW(theirs, **options), theirs, range(steps))
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


@pytest.mark.parametrize("make", FAMILY)
def test_a_parameter_is_followed_to_other_memory(make: Any, device: str) -> None:
    """cuDNN's recurrent layers put their weights together whenever a model is sent to its device: P-tuning with an LSTM
    could not be trained on a GPU.
    """
    ours, moved = parameters(device), parameters(device)
    optimizers = [make(params, lr=1e-2) for params in (ours, moved)]
    for step in range(4):
        together = torch.cat([p.detach().flatten() for p in moved])
        for p, part in zip(moved, together.split([p.numel() for p in moved]), strict=True):
            if step != 2:
                p.data = part.view(p.shape)
        for optimizer, params in zip(optimizers, (ours, moved), strict=True):
            gradients(params, step)
            optimizer.step()
    for p, q in zip(ours, moved, strict=True):
        assert_exact(p.detach(), q.detach())


@pytest.mark.gpu
def test_recurrent_layers_that_are_sent_to_their_device_again() -> None:
    lstm = nn.LSTM(8, 8, num_layers=2, bidirectional=True).cuda()
    optimizer = AdamW(lstm.parameters(), lr=1e-2)
    for _ in range(3):
        lstm.to("cuda")
        before = [p.detach().clone() for p in lstm.parameters()]
        lstm(torch.randn(3, 2, 8, device="cuda"))[0].square().sum().backward()
        optimizer.step()
        assert not any(torch.equal(p, q) for p, q in zip(lstm.parameters(), before, strict=True))


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


def test_a_group_that_is_added_later_starts_at_its_own_first_step(device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    for make, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = make(params[:2], lr=1e-2)
        run(optimizer, params[:2], range(5))
        optimizer.add_param_group({"params": params[2:], "lr": 3e-3})
        run(optimizer, params, range(5, 10))
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            assert_optimizer(p, q)


@pytest.mark.parametrize("kind", ["float", "tensor on the CPU", "tensor"])
def test_schedulers(kind: str, device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    lr: Any = 1e-2 if kind == "float" else torch.tensor(1e-2, device=device if kind == "tensor" else "cpu")
    for optimizer, params in (
        (AdamW(ours, lr=lr.clone() if isinstance(lr, Tensor) else lr), ours),
        (torch.optim.AdamW(theirs, lr=1e-2), theirs),
    ):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for step in range(20):
            gradients(params, step)
            optimizer.step()
            scheduler.step()
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            assert_optimizer(p, q)


def test_the_closure_is_evaluated_with_gradients(device: str) -> None:
    param = nn.Parameter(torch.ones(3, device=device))
    optimizer = AdamW([param], lr=0.5, weight_decay=0.0, eps=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert_exact(param.detach(), torch.full((3,), 0.5, device=device))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
def test_gradients_of_another_dtype_than_their_parameters(device: str) -> None:
    """It may change from step to step, and the lists are then made anew."""
    ours, theirs = parameters(device), parameters(device)
    first, second = AdamW(ours, lr=1e-2), AdamW(theirs, lr=1e-2)
    for step in range(6):
        gradients(theirs, step)
        for p, q in zip(ours, theirs, strict=True):
            assert q.grad is not None
            p.grad_dtype = None
            p.grad = q.grad.bfloat16() if step % 3 else q.grad.clone()
            q.grad = p.grad.float()
        first.step()
        second.step()
    assert_same_bits(ours, theirs)


def test_gradients_that_are_not_contiguous(device: str) -> None:
    ours, theirs = parameters(device, shapes=[(6, 6)]), parameters(device, shapes=[(6, 6)])
    first, second = AdamW(ours, lr=1e-2), AdamW(theirs, lr=1e-2)
    for step in range(4):
        gradients(ours, step)
        assert ours[0].grad is not None
        theirs[0].grad = ours[0].grad.t().contiguous()
        if step % 2:  # the same memory as in the step before, seen the other way round
            ours[0].grad = ours[0].grad.t()
        else:
            theirs[0].grad = ours[0].grad
        first.step()
        second.step()
    assert_same_bits(ours, theirs)


def test_stochastic_rounding_keeps_what_nearest_rounding_loses(device: str) -> None:
    params = [nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16, device=device)) for _ in range(2)]
    for param, stochastic in zip(params, (False, True), strict=True):
        optimizer = AdamW([param], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic)
        for _ in range(20):  # each step is a fortieth of the distance between neighbours
            param.grad = torch.ones_like(param)
            optimizer.step()
    assert_exact(params[0].detach(), torch.ones_like(params[0]))
    moved = 1.0 - float(params[1].detach().float().mean())
    assert moved == pytest.approx(20e-4, rel=0.05)


def test_stochastic_rounding_is_the_same_at_every_run_and_other_with_another_seed(device: str) -> None:
    runs = [parameters(device, torch.bfloat16) for _ in range(3)]
    for params, seed in zip(runs, (5, 5, 6), strict=True):
        run(AdamW(params, lr=1e-4, stochastic_rounding=True, seed=seed), params, range(3))
    assert_same_bits(runs[0], runs[1])
    assert any(not torch.equal(p, q) for p, q in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("make", FAMILY)
def test_torchs_arguments_are_taken(make: Any) -> None:
    param = nn.Parameter(torch.ones(3))
    options = {"foreach": True, "capturable": True, "fused": True, "differentiable": False}
    (group,) = make([param], 2e-3, (0.8, 0.99), 1e-7, 0.1, False, **options).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2e-3, (0.8, 0.99), 1e-7, 0.1)


def test_state_that_is_taken_away_is_made_anew(device: str) -> None:
    """A training loop that restarts its optimizer clears `state`; the lists made of it must go with it."""
    ours, fresh = parameters(device), parameters(device)
    optimizer = AdamW(ours, lr=1e-2)
    run(optimizer, ours, range(3))
    for p, q in zip(ours, fresh, strict=True):
        q.data.copy_(p.data)
    optimizer.state.clear()
    run(optimizer, ours, [7])
    run(AdamW(fresh, lr=1e-2), fresh, [7])
    assert_same_bits(ours, fresh)


def test_a_copy_goes_on_as_its_original(device: str) -> None:
    model = nn.Linear(8, 8, device=device)
    optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5)
    run(optimizer, list(model.parameters()), range(3))
    other_model, other = copy.deepcopy((model, optimizer))
    assert other.max_grad_norm == 0.5
    for each, of in ((optimizer, model), (other, other_model)):
        run(each, list(of.parameters()), range(3, 5))
    assert_same_bits(list(model.parameters()), list(other_model.parameters()))
    assert not torch.equal(optimizer.state[model.weight]["exp_avg"], torch.zeros(8, 8, device=device))


def test_a_compiled_model_trains(device: str) -> None:
    models = [nn.Linear(8, 4, device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(5, 8, device=device)
    for model, call in zip(models, (models[0], torch.compile(models[1], backend="aot_eager")), strict=True):
        optimizer = AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            call(x).square().sum().backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_optimizer(q, p)


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
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
    assert_same_bits(params, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("make", FAMILY)
def test_steps_replayed_from_a_graph_are_steps(make: Any) -> None:
    """With a learning rate on the device, clipping, and a step in between that no graph knows of.

    Rates are powers of two: one on the device is float32.
    """
    shapes = [(300, 70), (5,), (64, 65)]
    ours, expected = parameters("cuda", shapes=shapes), parameters("cuda", shapes=shapes)
    lr = torch.tensor(2.0**-7, device="cuda")
    options = {"max_grad_norm": 1.0, "weight_decay": 0.1}
    optimizer, eager = make(ours, lr=lr, **options), make(expected, lr=2.0**-7, **options)
    gradients(ours, 0)
    static = [p.grad for p in ours]
    optimizer.step()  # makes the state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def set_static(step: int) -> None:
        gradients(expected, step)
        for mine, p in zip(static, expected, strict=True):
            assert mine is not None and p.grad is not None
            mine.copy_(p.grad)

    gradients(expected, 0)
    eager.step()
    for step in (1, 2, 3, 4):
        rate = 2.0 ** (-7 - step)
        lr.fill_(rate)
        eager.param_groups[0]["lr"] = rate
        set_static(step)
        if step == 3:
            for p, mine in zip(ours, static, strict=True):
                assert mine is not None
                p.grad = mine.clone()
            optimizer.step()
        else:
            graph.replay()
        eager.step()
    assert_same_bits(ours, expected)


@pytest.mark.gpu
def test_a_step_neither_waits_nor_allocates_once_it_is_warm() -> None:
    params = parameters("cuda")
    optimizer = AdamW(params, lr=1e-2, max_grad_norm=1.0)
    run(optimizer, params, range(2))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_a_graph_of_a_first_step_is_refused() -> None:
    params = parameters("cuda", shapes=[(8,)])
    gradients(params, 0)
    optimizer = PagedAdamW(params)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    told = r"PagedAdamW: parameter 0 of group 0 .* has no state yet"
    with pytest.raises(RuntimeError, match=told), torch.cuda.graph(graph, stream=stream):
        optimizer.step()


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
