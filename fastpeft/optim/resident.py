"""State that lies beside its parameters: ordinary tensors, where the optimizer's ``state`` shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastpeft.ops.adamw import AdamWList
from fastpeft.optim.base import AdamWBase
from fastpeft.optim.formats import Moments, Saved, blocks
from fastpeft.optim.parameter import Entry
from fastpeft.optim.plan import Batch, Plan

_FLOAT32 = ("exp_avg", "exp_avg_sq")
_EIGHT_BIT = ("state1", "state2", "absmax1", "absmax2")


class ResidentState(AdamWBase):
    """Keeps moments as tensors on the parameter's device, in float32 or in 8 bits, parameter by parameter."""

    _own_options = (*AdamWBase._own_options, "_min_8bit_size")
    _min_8bit_size: int | None = None  # elements from which on a parameter has 8-bit state; None for never

    def memory(self) -> dict[str, int]:
        """Bytes of state by place, ``{"device": ..., "host": ...}``; the device's are those on a GPU."""
        total = {"device": 0, "host": 0}
        for state in self.state.values():
            for tensor in state.values():
                total["device" if tensor.is_cuda else "host"] += tensor.nbytes
        return total

    def _eight_bit(self, entry: Entry) -> bool:
        return self._min_8bit_size is not None and entry.shape.numel() >= self._min_8bit_size

    def _create_state(self, entries: Sequence[Entry]) -> None:
        # One tensor of all step counts: hundreds of scalars by themselves would be hundreds of allocations.
        steps = torch.zeros(len(entries), dtype=torch.float32, device=entries[0].device)
        for entry, step in zip(entries, steps.unbind(), strict=True):
            self.state[entry.param] = {"step": step, **self._zeros(entry)}

    def _zeros(self, entry: Entry) -> dict[str, Tensor]:
        numel, shape = entry.shape.numel(), entry.shape
        kinds: list[tuple[str, torch.Size, torch.dtype]] = [(key, shape, torch.float32) for key in _FLOAT32]
        if self._eight_bit(entry):
            scales = torch.Size([blocks(numel)])
            kinds = [(key, shape, torch.uint8) for key in _EIGHT_BIT[:2]]
            kinds += [(key, scales, torch.float32) for key in _EIGHT_BIT[2:]]
        return {key: torch.zeros(size, dtype=dtype, device=entry.device) for key, size, dtype in kinds}

    def _moments(self, entry: Entry) -> Moments:
        state = self.state[entry.param]
        keys = _EIGHT_BIT if "absmax1" in state else _FLOAT32
        return Moments(*(state[key].view(-1) for key in keys))

    def _load_state(self, entry: Entry, saved: Saved) -> None:
        moments = saved.as_eight_bit() if self._eight_bit(entry) else saved.as_float32()
        for target, source in zip(self._moments(entry).tensors, moments.tensors, strict=True):
            target.copy_(source)

    def _batches(self, plan: Plan) -> list[Batch]:
        return self._resident_batches(plan, range(len(plan.entries)))

    def _resident_batches(self, plan: Plan, of: Iterable[int]) -> list[Batch]:
        """Batches of the parameters at these places of the plan."""
        places: dict[tuple[object, ...], list[int]] = {}
        for place in of:
            entry = plan.entries[place]
            key = (entry.group, entry.device, entry.dtype, plan.dtypes[place], self._moments(entry).eight_bit)
            places.setdefault(key, []).append(place)
        return [self._batch(plan, members) for members in places.values()]

    def _batch(self, plan: Plan, members: list[int]) -> Batch:
        entries = [plan.entries[place] for place in members]
        moments = [self._moments(entry) for entry in entries]
        eight_bit = moments[0].eight_bit
        rows = AdamWList(
            [entry.local.detach() for entry in entries],
            [self.state[entry.param]["step"] for entry in entries],
            [of_one.exp_avg for of_one in moments],
            [of_one.exp_avg_sq for of_one in moments],
            [of_one.absmax for of_one in moments if of_one.absmax is not None] if eight_bit else None,
            [of_one.absmax_sq for of_one in moments if of_one.absmax_sq is not None] if eight_bit else None,
            numbers=[entry.number for entry in entries],
        )
        return Batch(entries[0].group, entries[0].device, plan.dtypes[members[0]], rows, members)
