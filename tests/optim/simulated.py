"""An arena without a GPU, so that what optimizers do with one is tested on any machine: bytes of the CPU in two places.

Pages of the device and of the host are different memory, as in a pinned arena, and what a page left behind is filled
with garbage: state that is read where it is not any more shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft.ops.adamw import AdamWList
from fastpeft.optim import paged_state, placement, store

PAGE = 16 << 10


class SimulatedArena:
    page_bytes = PAGE

    def __init__(self, nbytes: int, device: torch.device, mode: str = "pinned", *, slot_bytes: int = 0) -> None:
        self.nbytes, self.mode = -(-nbytes // PAGE) * PAGE, mode
        self.memories = {on_device: torch.zeros(self.nbytes, dtype=torch.uint8) for on_device in (True, False)}
        self._places = [False] * (self.nbytes // PAGE)

    def view(self, offset: int, nbytes: int) -> Tensor:
        pages = self._places[offset // PAGE : -(-(offset + nbytes) // PAGE)]
        assert len(set(pages)) <= 1, "a view of pages of both places"
        return self.memories[bool(pages and pages[0])][offset : offset + nbytes]

    def move(self, first_page: int, pages: int, place: str) -> None:
        target = place == "device"
        for page in range(first_page, first_page + pages):
            if self._places[page] != target:
                part = slice(page * PAGE, (page + 1) * PAGE)
                self.memories[target][part] = self.memories[not target][part]
                self.memories[not target][part] = 0xA5
                self._places[page] = target

    def places(self) -> list[bool]:
        return list(self._places)

    def memory(self) -> dict[str, int]:
        on_device = sum(self._places) * PAGE
        return {"device": on_device, "host": self.nbytes - on_device}


class SimulatedFarList(AdamWList):
    """Steps where the state lies, after looking that it is the host."""

    def __init__(self, arena: SimulatedArena, *lists: Any, **options: Any) -> None:
        super().__init__(*lists, **options)
        begin = arena.memories[False].data_ptr()
        for tensors in lists[2:]:
            assert all(begin <= tensor.data_ptr() < begin + arena.nbytes for tensor in tensors)


class SimulatedGPU:
    """What the optimizers ask of torch.cuda.

    Attributes:
        free: bytes that the device has left besides the state.
    """

    def __init__(self) -> None:
        self.free = 1 << 40
        self.stores: list[Any] = []

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        near = sum(each.near_bytes for each in self.stores)
        return self.free - near, self.free


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGPU:
    """Parameters on the CPU are paged, in cells of a page of 16 KB or two."""
    gpu = SimulatedGPU()

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    def made(*arguments: Any) -> Any:
        gpu.stores.append(original(*arguments))
        return gpu.stores[-1]

    original = store.Store
    a_stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda _: None)
    cuda = SimpleNamespace(
        mem_get_info=gpu.mem_get_info,
        current_stream=lambda _: a_stream,
        synchronize=lambda _: None,
        Stream=lambda _: a_stream,
        stream=stream,
        is_current_stream_capturing=lambda: False,
    )
    monkeypatch.setattr(paged_state, "torch", SimpleNamespace(**{**vars(torch), "cuda": cuda}))
    monkeypatch.setattr(store, "Arena", SimulatedArena)
    monkeypatch.setattr(paged_state, "Store", made)
    monkeypatch.setattr(paged_state, "AdamWFarList", SimulatedFarList)
    monkeypatch.setattr(placement, "CELL_BYTES", 2 * PAGE)
    is_paged = lambda self, entry: self._min_8bit_size is None or self._eight_bit(entry)  # noqa: E731
    monkeypatch.setattr(paged_state.PagedState, "_is_paged", is_paged)
    return gpu
