"""State on the host: what travels in which slot, without a GPU, and with one the same bits as state on the device."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
import torch
from ops.adamw_reference import HYPER
from tolerances import assert_exact
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops.adamw import BLOCK, AdamWControl, AdamWFarList, AdamWList, adamw_gradient_norm
from fastpeft.ops.arena import Arena

MB = 1 << 20
SIZES = [1 << 21, 3, 700_001, 0, 256, 99_999, 1 << 20]


def lay_out(memory: Tensor, sizes: list[int], eight_bit: bool, gap: int = 0) -> list[list[Tensor]]:
    """Moments, and scales of 8-bit ones, one tensor's state behind the other's; ``gap`` bytes between any two parts."""
    at, state = 0, []
    for n in sizes:
        parts = []
        kinds = [(n, torch.uint8 if eight_bit else torch.float32)] * 2
        kinds += [(-(-n // BLOCK), torch.float32)] * 2 if eight_bit else []
        for count, dtype in kinds:
            nbytes = count * dtype.itemsize
            parts.append(memory[at : at + nbytes].view(dtype))
            at = -(-(at + nbytes + gap) // 16) * 16
        state.append(parts)
    return state


def columns(state: list[list[Tensor]]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*state, strict=True)]


@pytest.mark.parametrize("gap", [0, 4096], ids=["adjoining", "apart"])
@pytest.mark.parametrize("eight_bit", [False, True], ids=["float32", "8bit"])
@pytest.mark.parametrize("slot_bytes", [2 * MB, 16 * MB])
def test_every_element_travels_once_in_one_slot(slot_bytes: int, eight_bit: bool, gap: int) -> None:
    memory = torch.zeros(64 * MB, dtype=torch.uint8)
    state = lay_out(memory, SIZES, eight_bit, gap)
    params = [torch.zeros(n) for n in SIZES]
    rows = AdamWList(params, [torch.zeros(()) for _ in SIZES], *columns(state))
    taken: dict[int, int] = {}
    batches = native.adamw_far_plan(rows._native, slot_bytes)
    for number, (copies, pieces) in enumerate(batches):
        begin, end = number % 3 * slot_bytes, (number % 3 + 1) * slot_bytes
        ends = sorted((slot, slot + nbytes) for _, slot, nbytes in copies)
        assert begin <= ends[0][0] and ends[-1][1] <= end
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(ends))
        assert all(host % 16 == slot % 16 for host, slot, _ in copies)
        for source, offset, numel, param, *addresses in pieces:
            assert offset == taken.get(source, 0) and param == params[source].data_ptr() + 4 * offset
            assert offset % 4096 == 0
            taken[source] = offset + numel
            for tensor, address, scales in zip(state[source], addresses, [False, False, True, True], strict=False):
                first = offset // BLOCK if scales else offset
                count = -(-numel // BLOCK) if scales else numel
                at = tensor.data_ptr() + first * tensor.element_size()
                nbytes = count * tensor.element_size()
                (found,) = [c for c in copies if c[0] <= at and at + nbytes <= c[0] + c[2]]
                assert address - found[1] == at - found[0]
    assert taken == {i: n for i, n in enumerate(SIZES) if n}
    if gap == 0 and slot_bytes == 16 * MB and not eight_bit:
        assert [len(copies) for copies, _ in batches] == [2, 2], "what adjoins is copied at once"
    full = [sum(nbytes for _, _, nbytes in copies) for copies, _ in batches]
    assert all(nbytes > slot_bytes // 2 for nbytes in full[:-1]), "slots are filled"


def test_an_arena_needs_a_cuda_device_and_a_mode() -> None:
    with pytest.raises(ValueError, match="device is cpu; an arena needs a CUDA device"):
        Arena(MB, torch.device("cpu"))
    with pytest.raises(ValueError, match="mode is 'paged'"):
        Arena(MB, torch.device("cuda", 0), "paged")  # type: ignore[arg-type]


# --- on a GPU --------------------------------------------------------------------------------------------------------

Mode = Literal["managed", "pinned"]


def make_arena(nbytes: int, mode: Mode) -> Arena:
    if mode == "managed" and Arena(1, torch.device("cuda", 0)).mode != "managed":
        pytest.skip("needs a device with concurrent access to managed memory")
    return Arena(nbytes, torch.device("cuda", 0), mode, slot_bytes=4 * MB)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["managed", "pinned"])
def test_pages_move_and_keep_their_contents(mode: Mode) -> None:
    arena = make_arena(7 * MB, mode)
    page = arena.page_bytes
    assert (arena.nbytes, arena.mode, arena.places()) == (8 * MB, mode, [False] * 4)
    assert not arena.view(0, arena.nbytes).any()
    pattern = (torch.arange(arena.nbytes) % 251).to(torch.uint8)
    arena.view(0, arena.nbytes).copy_(pattern)
    arena.move(1, 2, "device")
    assert arena.places() == [False, True, True, False]
    assert arena.memory() == {"device": 4 * MB, "host": 4 * MB}
    arena.move(0, 2, "device")
    arena.move(1, 3, "host")
    arena.move(3, 1, "device")
    assert arena.places() == [True, False, False, True]
    for i in range(4):
        torch.cuda.synchronize()
        view = arena.view(i * page, page)
        assert view.is_cuda == (mode == "managed" or arena.places()[i])
        assert_exact(view.cpu(), pattern[i * page : (i + 1) * page])
    if mode == "pinned":
        with pytest.raises(ValueError, match="lie in both places"):
            arena.view(0, 2 * page)
    with pytest.raises(ValueError, match="pages from 3 to 5 are outside its 4"):
        arena.move(3, 2, "host")
    with pytest.raises(ValueError, match="are outside its"):
        arena.view(arena.nbytes - 1, 2)
    view = arena.view(0, 16)
    del arena
    assert int(view[1]) == 1, "a view keeps the memory"


@pytest.mark.gpu
def test_pinned_pages_give_their_memory_back() -> None:
    arena = make_arena(256 * MB, "pinned")
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    arena.move(0, 128, "device")
    assert before - torch.cuda.mem_get_info()[0] >= 256 * MB
    arena.move(0, 128, "host")
    assert before - torch.cuda.mem_get_info()[0] < 16 * MB


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["managed", "pinned"])
@pytest.mark.parametrize("eight_bit", [False, True], ids=["float32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_far_steps_have_the_bits_of_near_ones(dtype: torch.dtype, eight_bit: bool, mode: Mode) -> None:
    """Also from a stream of its own, with clipping and stochastic rounding, half of the time with a step skipped."""
    arena = make_arena(64 * MB, mode)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(n, generator=generator).to("cuda", dtype) for n in SIZES]
    plain = torch.zeros(arena.nbytes, dtype=torch.uint8, device="cuda")
    runs: list[tuple[AdamWList, list[Tensor], AdamWControl]] = []
    for far in (False, True):
        memory = arena.view(0, arena.nbytes) if far else plain
        state = columns(lay_out(memory, SIZES, eight_bit))
        params, steps = [p.clone() for p in start], [torch.zeros((), device="cuda") for _ in SIZES]
        rows = AdamWFarList(arena, params, steps, *state) if far else AdamWList(params, steps, *state)
        runs.append((rows, params, AdamWControl(torch.device("cuda", 0))))
    options: dict[str, Any] = {**HYPER, "stochastic_rounding": dtype == torch.bfloat16}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for step in range(4):
        grads = [torch.randn(n, generator=generator).to("cuda", dtype) for n in SIZES]
        if step == 2:
            grads[0][5] = torch.nan
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for rows, _, control in runs:
                adamw_gradient_norm([grads], control, max_norm=1.0)
                rows.step(grads, control, **options)
    stream.synchronize()
    for near, far_ in zip(runs[0][1], runs[1][1], strict=True):
        assert_exact(far_, near)
    assert int(runs[1][2].skipped) == 1
    assert_exact(arena.view(0, arena.nbytes).cpu(), plain.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["managed", "pinned"])
def test_a_far_step_waits_for_the_caller_and_the_caller_for_it(mode: Mode) -> None:
    n = 1 << 21
    arena = make_arena(8 * n, mode)
    m, v = (arena.view(4 * n * i, 4 * n).view(torch.float32) for i in range(2))
    p, grad = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
    rows = AdamWFarList(arena, [p], [torch.zeros((), device="cuda")], [m], [v])
    control = AdamWControl(torch.device("cuda", 0))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        grad.fill_(1.0)
        rows.step([grad], control, **{**HYPER, "weight_decay": 0.0})
        result = p.clone()
    stream.synchronize()
    assert float(result.max()) == pytest.approx(-HYPER["lr"], rel=1e-5)
    assert float(m.max()) == pytest.approx(1 - HYPER["betas"][0], rel=1e-5)
