"""Paged state: the same bits wherever it lies. With a simulated arena on any machine, with real ones on a GPU."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from optim.problems import Params, assert_same_bits, gradients, parameters, run
from optim.simulated import PAGE, SimulatedGPU, simulated_gpu
from tolerances import assert_exact

from fastpeft.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit

__all__ = ["simulated_gpu"]

PAIRS = pytest.mark.parametrize(("paged", "plain"), [(PagedAdamW, AdamW), (PagedAdamW8bit, AdamW8bit)])
SHAPES = [(300, 70), (5,), (64, 65), (1, 4097), (2000,), (123, 457)]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0}


def groups(params: Params) -> list[dict[str, Any]]:
    return [{"params": params[:3]}, {"params": params[3:], "lr": 3e-3, "betas": (0.8, 0.99)}]


def state_bytes(optimizer: PagedAdamW) -> int:
    return sum(store.layout.nbytes for store in optimizer._stores)


@PAIRS
@pytest.mark.parametrize("budget", [0, 1, 100_000, 300_000, None])
def test_budgets_change_no_bit(paged: Any, plain: Any, budget: int | None, simulated_gpu: SimulatedGPU) -> None:
    ours, expected = parameters("cpu", shapes=SHAPES), parameters("cpu", shapes=SHAPES)
    optimizer = paged(groups(ours), device_budget_bytes=budget, **OPTIONS)
    run(optimizer, ours, range(4))
    run(plain(groups(expected), **OPTIONS), expected, range(4))
    assert_same_bits(ours, expected)
    memory = optimizer.memory()
    beside = sum(
        t.nbytes for state in optimizer.state.values() for t in state.values()
    )  # all counts as the host's here
    assert memory["device"] + memory["host"] == state_bytes(optimizer) + beside
    assert memory["device"] == state_bytes(optimizer) if budget is None else memory["device"] <= budget


@PAIRS
def test_a_run_whose_budget_changes_ends_with_the_same_bits(
    paged: Any, plain: Any, simulated_gpu: SimulatedGPU
) -> None:
    ours, expected = parameters("cpu", shapes=SHAPES), parameters("cpu", shapes=SHAPES)
    optimizer, other = paged(groups(ours), **OPTIONS), plain(groups(expected), **OPTIONS)
    run(optimizer, ours, [0])
    run(other, expected, [0])
    for step, part in enumerate((1.0, 0.3, 0.0, 0.7, 0.6, 1.0), 1):
        optimizer.device_budget_bytes = int(part * state_bytes(optimizer))
        for params, each in ((ours, optimizer), (expected, other)):
            gradients(params, step)
            params[step % len(params)].grad = None
            each.step()
        near = optimizer.memory()["device"]
        assert optimizer.device_budget_bytes - 2 * PAGE < near <= optimizer.device_budget_bytes
    assert_same_bits(ours, expected)


@PAIRS
def test_evict_makes_room_and_state_comes_back(paged: Any, plain: Any, simulated_gpu: SimulatedGPU) -> None:
    ours, expected = parameters("cpu", shapes=SHAPES), parameters("cpu", shapes=SHAPES)
    optimizer = paged(groups(ours), reserve_bytes=0, **OPTIONS)
    run(optimizer, ours, range(2))
    size = state_bytes(optimizer)
    assert optimizer.memory()["device"] == size
    assert 50_000 <= optimizer.evict(50_000) < 50_000 + 2 * PAGE
    assert optimizer.memory()["device"] <= size - 50_000
    simulated_gpu.free = size - 50_000  # somebody takes what was freed
    run(optimizer, ours, [2])
    assert optimizer.memory()["device"] <= size - 50_000
    assert optimizer.evict() > 0 and optimizer.memory()["device"] == 0
    assert optimizer.evict() == optimizer.evict(1) == 0
    simulated_gpu.free = 1 << 40
    run(optimizer, ours, [3])
    assert optimizer.memory()["device"] == size
    run(plain(groups(expected), **OPTIONS), expected, range(4))
    assert_same_bits(ours, expected)


@PAIRS
def test_what_the_device_has_left_is_what_state_takes(paged: Any, plain: Any, simulated_gpu: SimulatedGPU) -> None:
    params = parameters("cpu", shapes=SHAPES)
    optimizer = paged(params, reserve_bytes=30_000)
    simulated_gpu.free = 130_000
    run(optimizer, params, range(3))
    assert 100_000 - 2 * PAGE <= optimizer.memory()["device"] <= 100_000


@PAIRS
@pytest.mark.parametrize("budget", [0, 150_000, None])
def test_state_dicts_are_those_of_the_plain_one(
    paged: Any, plain: Any, budget: int | None, simulated_gpu: SimulatedGPU
) -> None:
    ours, expected = parameters("cpu", shapes=SHAPES), parameters("cpu", shapes=SHAPES)
    optimizer, other = paged(groups(ours), device_budget_bytes=budget, **OPTIONS), plain(groups(expected), **OPTIONS)
    run(optimizer, ours, range(3))
    run(other, expected, range(3))
    saved, wanted = copy.deepcopy(optimizer.state_dict()), other.state_dict()
    for key, entry in wanted["state"].items():
        assert saved["state"][key].keys() == entry.keys()
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                assert_exact(saved["state"][key][name], value)
            else:
                assert saved["state"][key][name] == value
    copies = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    restored = paged(groups(copies), device_budget_bytes=100_000, **OPTIONS)
    restored.load_state_dict(saved)
    run(restored, copies, range(3, 5))
    run(other, expected, range(3, 5))
    assert_same_bits(copies, expected)
    optimizer.load_state_dict(saved)
    run(optimizer, ours, range(3, 5))
    assert_same_bits(ours, expected)


@PAIRS
def test_parameters_added_later_and_state_taken_away(paged: Any, plain: Any, simulated_gpu: SimulatedGPU) -> None:
    ours, expected = parameters("cpu", shapes=SHAPES), parameters("cpu", shapes=SHAPES)
    for params, make in ((ours, paged), (expected, plain)):
        optimizer = make(params[:2], lr=1e-2)
        if make is paged:
            optimizer.device_budget_bytes = 200_000
        run(optimizer, params[:2], range(2))
        optimizer.add_param_group({"params": params[2:]})
        run(optimizer, params, range(2, 4))
        optimizer.state.clear()
        run(optimizer, params, range(4, 6))
        if make is paged:
            assert len(optimizer._stores) == 2 and optimizer.memory()["device"] <= 200_000
    assert_same_bits(ours, expected)


@PAIRS
def test_random_rounding_does_not_depend_on_the_place(paged: Any, plain: Any, simulated_gpu: SimulatedGPU) -> None:
    ours, expected = (parameters("cpu", torch.bfloat16, SHAPES) for _ in range(2))
    options = {"lr": 1e-3, "stochastic_rounding": True, "seed": 3}
    run(paged(ours, device_budget_bytes=150_000, **options), ours, range(3))
    run(plain(expected, **options), expected, range(3))
    assert_same_bits(ours, expected)


def test_it_is_not_copied_with_an_arena(simulated_gpu: SimulatedGPU) -> None:
    params = parameters("cpu", shapes=SHAPES)
    optimizer = PagedAdamW(params)
    run(optimizer, params, [0])
    with pytest.raises(TypeError, match=r"PagedAdamW: it cannot be pickled or copied; save its state_dict\(\)"):
        copy.deepcopy(optimizer)


@PAIRS
def test_on_the_cpu_it_is_the_plain_one(paged: Any, plain: Any) -> None:
    ours, expected = parameters("cpu", shapes=SHAPES), parameters("cpu", shapes=SHAPES)
    optimizer = paged(groups(ours), device_budget_bytes=0, **OPTIONS)
    run(optimizer, ours, range(3))
    run(plain(groups(expected), **OPTIONS), expected, range(3))
    assert_same_bits(ours, expected)
    assert optimizer.memory()["device"] == 0 and optimizer.evict() == 0
    other = copy.deepcopy(optimizer)
    assert other.device_budget_bytes == 0


# On a GPU. State of a few tens of megabytes: a budget makes paging happen at any size.

BIG = [(1 << 20,), (300, 70), (5,), (1000, 2001), (3_000_003,), (64, 65)]
MODES = pytest.mark.parametrize("pinned", [False, True], ids=["managed", "pinned"])


@pytest.mark.gpu
@MODES
@PAIRS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_budgets_midway_on_a_gpu(paged: Any, plain: Any, pinned: bool, dtype: torch.dtype) -> None:
    ours, expected = parameters("cuda", dtype, BIG), parameters("cuda", dtype, BIG)
    rounding = {"stochastic_rounding": dtype == torch.bfloat16}
    optimizer = paged(groups(ours), pinned=pinned, device_budget_bytes=0, **OPTIONS, **rounding)
    other = plain(groups(expected), **OPTIONS, **rounding)
    for step, part in enumerate((0.0, 1.0, 0.5, 0.25, 0.0, 0.75, 1.0)):
        if step:
            optimizer.device_budget_bytes = int(part * state_bytes(optimizer))
        for params, each in ((ours, optimizer), (expected, other)):
            gradients(params, step)
            each.step()
    assert_same_bits(ours, expected)
    saved = optimizer.state_dict()["state"]
    for key, entry in other.state_dict()["state"].items():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                assert_exact(saved[key][name].cpu(), value.cpu())


@pytest.mark.gpu
@MODES
def test_a_graph_of_a_resident_step_and_none_of_a_far_one(pinned: bool) -> None:
    params = parameters("cuda", shapes=BIG)
    optimizer = PagedAdamW(params, pinned=pinned, device_budget_bytes=0)
    run(optimizer, params, [0])
    stream = torch.cuda.Stream()
    told = r"PagedAdamW: state lies in host memory, and steps that stream it cannot be captured"
    with pytest.raises(RuntimeError, match=told), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        optimizer.step()
    torch.cuda.synchronize()
    optimizer.device_budget_bytes = None
    optimizer.reserve_bytes = 0
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step()
    assert optimizer.evict() == 0, "the graph knows where the state is"
    graph.replay()
    torch.cuda.synchronize()
    assert float(optimizer.state_dict()["state"][0]["step"]) == 3


@pytest.mark.gpu
@MODES
def test_far_state_on_another_stream_beside_other_work(pinned: bool) -> None:
    """Gradients come from the caller's stream, and the next forward there must see the update."""
    ours, expected = parameters("cuda", shapes=BIG), parameters("cuda", shapes=BIG)
    optimizer = PagedAdamW(ours, lr=1e-2, pinned=pinned, device_budget_bytes=16 << 20)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.cuda._sleep(10_000_000)  # the step is enqueued long before its gradients are there
            for p in ours:
                p.grad = torch.sin(p.detach())
            optimizer.step()
    stream.synchronize()
    plain = AdamW(expected, lr=1e-2)
    for _ in range(3):
        for p in expected:
            p.grad = torch.sin(p.detach())
        plain.step()
    assert_same_bits(ours, expected)


@pytest.mark.gpu
@MODES
def test_fully_paged_state_holds_little_device_memory(pinned: bool) -> None:
    params = [torch.nn.Parameter(torch.zeros(1 << 26, dtype=torch.bfloat16, device="cuda"))]  # 512 MB of state
    params[0].grad = torch.ones_like(params[0])
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    optimizer = PagedAdamW(params, pinned=pinned, device_budget_bytes=0)
    optimizer.step()
    torch.cuda.synchronize()
    assert before - torch.cuda.mem_get_info()[0] < 64 << 20
    assert optimizer.memory()["device"] < 1 << 20 and optimizer.memory()["host"] >= 512 << 20


@pytest.mark.gpu
@MODES
def test_evicting_under_a_real_out_of_memory(pinned: bool) -> None:
    """The device is filled up to little more than the state, so that an allocation fails until the state is evicted."""
    params = [torch.nn.Parameter(torch.zeros(1 << 25, dtype=torch.bfloat16, device="cuda"))]  # 256 MB of state
    params[0].grad = torch.ones_like(params[0])
    optimizer = PagedAdamW(params, pinned=pinned)
    optimizer.step()
    torch.cuda.synchronize()
    size = state_bytes(optimizer)
    assert optimizer.memory()["device"] >= size
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    room = free - size // 2  # what torch's allocator may take: with the state there, half of it is missing
    allowed = torch.cuda.memory_reserved() + room
    try:
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        ballast = torch.empty(room - (32 << 20), dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(size // 2, dtype=torch.uint8, device="cuda")
        moved = optimizer.evict(size // 2)
        assert size // 2 <= moved <= size // 2 + (32 << 20)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (allowed + moved) / total))
        taken = torch.empty(size // 2 - (32 << 20), dtype=torch.uint8, device="cuda")
        optimizer.step()
        assert optimizer.memory()["device"] <= size - moved + (1 << 20)
        del taken, ballast
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    optimizer.reserve_bytes = 0
    optimizer.step()
    assert optimizer.memory()["device"] >= size, "there is room again"
    assert float(params[0].detach().float().mean()) != 0.0


TWO_PROCESSES = """
import sys, torch
sys.path[:0] = {paths!r}
from fastpeft.optim import PagedAdamW, AdamW
from optim.problems import parameters, run
shapes = [(1 << 22,), (300, 70), (3_000_003,)]
ours, expected = parameters("cuda", shapes=shapes, seed={seed}), parameters("cuda", shapes=shapes, seed={seed})
optimizer = PagedAdamW(ours, device_budget_bytes=16 << 20)
for part in (16, 0, 40, 8):
    optimizer.device_budget_bytes = part << 20
    run(optimizer, ours, range(5))
other = AdamW(expected)
for _ in range(4):
    run(other, expected, range(5))
print(all(torch.equal(p, q) for p, q in zip(ours, expected)))
"""


@pytest.mark.gpu
def test_two_processes_share_a_gpu() -> None:
    scripts = [TWO_PROCESSES.format(paths=sys.path, seed=seed) for seed in (1, 2)]
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for script in scripts
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and out == "True\n", err
