"""State that lies on the GPU as far as there is room, and in host memory beyond that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastpeft.ops.adamw import AdamWControl, AdamWFarList, AdamWList
from fastpeft.optim import placement
from fastpeft.optim.formats import Moments, Saved, blocks
from fastpeft.optim.parameter import Entry
from fastpeft.optim.plan import Batch, Plan
from fastpeft.optim.resident import ResidentState
from fastpeft.optim.store import Store


@dataclass
class _Rows:
    """Pieces of parameters, gathered to be made a list of."""

    places: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    moments: list[tuple[Tensor, ...]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def add(self, place: int, entry: Entry, step: Tensor, piece: placement.Piece, moments: tuple[Tensor, ...]) -> None:
        self.places.append(place)
        self.params.append(entry.local.detach())
        self.steps.append(step)
        self.moments.append(moments)
        self.offsets.append(piece.begin)
        self.numbers.append(entry.number)

    def make(self, kind: Callable[..., AdamWList]) -> AdamWList:
        return kind(
            self.params,
            self.steps,
            *map(list, zip(*self.moments, strict=True)),
            offsets=self.offsets,
            numbers=self.numbers,
        )


class PagedState(ResidentState):
    """Keeps the moments of CUDA parameters in arenas; small float32 ones and those of the CPU beside the parameters.

    A parameter of which pieces are near and far has two step counts, one for each launch: they run beside each other.
    """

    _own_options = (*ResidentState._own_options, "device_budget_bytes", "reserve_bytes", "_mode")
    device_budget_bytes: int | None
    reserve_bytes: int
    _mode: Literal["managed", "pinned"]

    def _reset(self) -> None:
        super()._reset()
        self._stores: list[Store] = []
        self._store_of: dict[Entry, Store] = {}
        self._sides: dict[torch.device, torch.cuda.Stream] = {}

    # What lies where.

    def evict(self, nbytes: int | None = None) -> int:
        """Move state from the GPU to host memory, and wait until its place is free.

        It comes back at a later step when there is room for it. Once a step was captured into a graph, which knows
        where the state was, nothing moves any more.

        Args:
            nbytes: how much room to make on each GPU; everything if None.
        Returns:
            Bytes that were moved, on all GPUs together; more than asked for, as whole cells of up to 16 MB move, or
            less where no more was there.
        """
        moved = 0
        if self._captured:
            return moved
        left = {store.device: nbytes for store in self._stores}
        for store in reversed(self._stores):
            wanted = left[store.device]
            cells = store.near_cells if wanted is None else -(-wanted // store.layout.cell_bytes)
            if cells <= 0 or store.near_cells == 0:
                continue
            before = store.near_bytes
            store.move_to(max(0, store.near_cells - cells))
            freed = before - store.near_bytes
            moved += freed
            if wanted is not None:
                left[store.device] = wanted - freed
        if moved:
            self._plan = None
            for device in left:
                torch.cuda.synchronize(device)
        return moved

    def memory(self) -> dict[str, int]:
        """Bytes of state by place, ``{"device": ..., "host": ...}``."""
        total = super().memory()
        for store in self._stores:
            for place, nbytes in store.arena.memory().items():
                total[place] += nbytes
        return total

    def _place(self) -> None:
        """Follow the budget, and bring back what there is room for."""
        for device in {store.device for store in self._stores}:
            stores = [store for store in self._stores if store.device == device]
            size, near = sum(store.layout.nbytes for store in stores), sum(store.near_bytes for store in stores)
            wanted = size if self.device_budget_bytes is None else min(size, self.device_budget_bytes)
            if near < wanted:
                wanted = placement.room(torch.cuda.mem_get_info(device)[0], self.reserve_bytes, near, wanted)
            for store in stores:
                cells = store.layout.cells_within(max(0, wanted))
                wanted -= store.layout.near_bytes(cells)
                if cells != store.near_cells:
                    store.move_to(cells)
                    self._plan = None

    # Stepping.

    def _create_state(self, entries: Sequence[Entry]) -> None:
        paged = [entry for entry in entries if self._is_paged(entry)]
        beside = [entry for entry in entries if entry not in set(paged)]
        if beside:
            super()._create_state(beside)
        for entry in paged:
            if entry in self._store_of:  # its state was taken away by hand, or by a state dict without it
                self._zero(entry)
        paged = [entry for entry in paged if entry not in self._store_of]
        if not paged:
            return
        store = Store(paged, self._min_8bit_size is not None, self._mode)
        steps = torch.zeros(len(paged), dtype=torch.float32, device=store.device)
        for entry, step in zip(paged, steps.unbind(), strict=True):
            self.state[entry.param], self._store_of[entry] = {"step": step}, store
        self._stores.append(store)
        self._place()

    def _zero(self, entry: Entry) -> None:
        store = self._store_of[entry]
        torch.cuda.current_stream(store.device).synchronize()  # far views of a pinned arena are the CPU's to write
        for piece in store.pieces[entry]:
            for tensor in store.tensors(piece):
                tensor.zero_()
        self.state[entry.param] = {"step": torch.zeros((), dtype=torch.float32, device=store.device)}
        self._plan = None

    def _is_paged(self, entry: Entry) -> bool:
        return entry.device.type == "cuda" and (self._min_8bit_size is None or self._eight_bit(entry))

    def _plan_step(self) -> Plan:
        if self._stores and not self._captured and not torch.cuda.is_current_stream_capturing():
            self._place()
        return super()._plan_step()

    def _batches(self, plan: Plan) -> list[Batch]:
        paged = [(place, entry) for place, entry in enumerate(plan.entries) if entry in self._store_of]
        beside = [place for place, entry in enumerate(plan.entries) if entry not in self._store_of]
        batches = self._resident_batches(plan, beside)
        if any(self._store_of[entry].is_far for _, entry in paged) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self._name}: state lies in host memory, and steps that stream it cannot be captured into a graph; "
                "give it a device_budget_bytes of all of it, or do not capture step()"
            )
        places: dict[tuple[Any, ...], list[tuple[int, Entry]]] = {}
        for place, entry in paged:
            key = (id(self._store_of[entry]), entry.group, entry.dtype, plan.dtypes[place])
            places.setdefault(key, []).append((place, entry))
        for members in places.values():
            batches += self._paged_batches(members, plan.dtypes[members[0][0]])
        return batches

    def _paged_batches(self, members: list[tuple[int, Entry]], grad_dtype: torch.dtype) -> list[Batch]:
        """The pieces of parameters of one store and group: those on the device, and those on the host."""
        first = members[0][1]
        store = self._store_of[first]
        sides: tuple[_Rows, _Rows] = _Rows(), _Rows()
        for place, entry in members:
            step = self.state[entry.param]["step"]
            pieces = store.pieces[entry]
            cut = {piece.cell >= store.near_cells for piece in pieces} == {True, False}
            far_step = step.clone() if cut else step
            for piece in pieces:
                far = piece.cell >= store.near_cells
                sides[far].add(place, entry, far_step if far else step, piece, store.tensors(piece))
        kinds: tuple[Callable[..., AdamWList], ...] = (AdamWList, partial(AdamWFarList, store.arena))
        return [
            Batch(first.group, store.device, grad_dtype, rows.make(kind), rows.places)
            for rows, kind in zip(sides, kinds, strict=True)
            if rows.places
        ]

    def _launch(self, plan: Plan, controls: Mapping[torch.device, AdamWControl]) -> None:
        """Stream what is far, and step what is near beside it on a stream of its own."""
        for device, control in controls.items():
            sides: tuple[list[Batch], list[Batch]] = [], []
            for batch in plan.batches:
                if batch.device == device:
                    sides[isinstance(batch.rows, AdamWFarList)].append(batch)
            near, far = sides
            if not (near and far):
                for batch in (*near, *far):
                    self._step_batch(batch, control)
                continue
            here, side = torch.cuda.current_stream(device), self._side(device)
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for batch in near:
                    self._step_batch(batch, control)
            for batch in far:
                self._step_batch(batch, control)
            here.wait_stream(side)

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._sides[device]

    # State dicts.

    def _moments(self, entry: Entry) -> Moments:
        """A copy in ordinary memory, piece by piece: the device may have no room for it."""
        if entry not in self._store_of:
            return super()._moments(entry)
        store, numel = self._store_of[entry], entry.shape.numel()
        torch.cuda.current_stream(store.device).synchronize()  # far views of a pinned arena are the CPU's to read
        copies = _empty(numel, store.eight_bit)
        for piece in store.pieces[entry]:
            for target, source in zip(_slices(copies, piece), store.tensors(piece), strict=True):
                target.copy_(source)
        return Moments(*copies)

    def _load_state(self, entry: Entry, saved: Saved) -> None:
        if entry not in self._store_of:
            return super()._load_state(entry, saved)
        store = self._store_of[entry]
        torch.cuda.current_stream(store.device).synchronize()
        moments = saved.as_eight_bit() if store.eight_bit else saved.as_float32()
        for piece in store.pieces[entry]:
            for target, source in zip(store.tensors(piece), _slices(moments.tensors, piece), strict=True):
                target.copy_(source)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled or copied where state lies in an arena."""
        if self._stores:
            raise TypeError(f"{self._name}: it cannot be pickled or copied; save its state_dict() instead")
        return super().__getstate__()


def _empty(numel: int, eight_bit: bool) -> tuple[Tensor, ...]:
    if not eight_bit:
        return torch.empty(numel), torch.empty(numel)
    codes = [torch.empty(numel, dtype=torch.uint8) for _ in range(2)]
    return *codes, torch.empty(blocks(numel)), torch.empty(blocks(numel))


def _slices(tensors: Sequence[Tensor], piece: placement.Piece) -> list[Tensor]:
    """What belongs to a piece in the flat moments of its parameter."""
    end = piece.begin + piece.numel
    scales = slice(piece.begin // placement.BLOCK, blocks(end))
    return [tensor[scales] if index >= 2 else tensor[piece.begin : end] for index, tensor in enumerate(tensors)]
