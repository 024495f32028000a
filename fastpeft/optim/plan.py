"""Which parameters step together: made once, and again only when other parameters have gradients than before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops.adamw import AdamWList
from fastpeft.optim.parameter import Entry, check_gradient, check_place

Key = tuple[int, torch.dtype, torch.dtype, torch.device, Any]


@dataclass
class Batch:
    """Parameters that one launch updates.

    Attributes:
        group: number of their group.
        device: where they are.
        rows: of the native core; each a parameter or a piece of one.
        members: for each row the place of its parameter's gradient in the step's list of gradients.
    """

    group: int
    device: torch.device
    rows: AdamWList
    members: list[int]


@dataclass
class Plan:
    """What a step does, as long as the same parameters have gradients of the same dtypes.

    Attributes:
        entries: the parameters that have a gradient.
        absent: those that have none.
        dtypes: of the gradients.
        batches: in the order they are stepped.
        groups_of_norm: for each device and dtype the places of its gradients, for the norm.
        states: how many parameters had state when the plan was made.
    """

    entries: list[Entry]
    absent: list[Entry]
    dtypes: list[torch.dtype]
    batches: list[Batch] = field(default_factory=list)
    groups_of_norm: dict[torch.device, list[list[int]]] = field(default_factory=dict)
    states: int = 0
    _locals: list[Tensor] = field(default_factory=list)
    _addresses: list[int] = field(default_factory=list)
    _grad_addresses: list[int] = field(default_factory=list)
    _distributed: bool = False

    def __post_init__(self) -> None:
        self._locals = [entry.local for entry in self.entries]
        self._addresses = [entry.address for entry in self.entries]
        self._distributed = any(entry.distributed for entry in self.entries)
        places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for place, (entry, dtype) in enumerate(zip(self.entries, self.dtypes, strict=True)):
            places.setdefault((entry.device, dtype), []).append(place)
        for (device, _), members in places.items():
            self.groups_of_norm.setdefault(device, []).append(members)

    def gradients(self, optimizer: str) -> list[Tensor] | None:
        """The gradients of this step, checked; None when another plan is needed.

        What is checked anew for every tensor is little, as there may be hundreds and a step must not wait for Python:
        its address, and whether it is contiguous. Only where an address changed is the rest looked at, which torch
        sees to itself where a gradient is made by autograd.

        Raises:
            ValueError: a parameter was moved, or a gradient cannot be taken; nothing was changed.
        """
        if self._distributed:
            grads = [entry.gradient for entry in self.entries]
        else:
            grads = [entry.param.grad for entry in self.entries]
        if any(entry.param.grad is not None for entry in self.absent):
            return None
        try:
            addresses = list(map(_data_ptr, grads))  # type: ignore[arg-type]
            contiguous = all(map(_is_contiguous, grads))  # type: ignore[arg-type]
        except (AttributeError, TypeError, RuntimeError, NotImplementedError):  # None, or sparse
            if any(grad is None for grad in grads):
                return None
            self._check_all(optimizer, grads)  # type: ignore[arg-type]
            raise
        if self._distributed or list(map(_data_ptr, self._locals)) != self._addresses:
            for entry in self.entries:
                check_place(optimizer, entry)
        if addresses != self._grad_addresses:
            self._check_all(optimizer, grads)  # type: ignore[arg-type]
            if [grad.dtype for grad in grads] != self.dtypes:  # type: ignore[union-attr]
                return None
            self._grad_addresses = addresses
        if not contiguous:
            return [grad.contiguous() for grad in grads]  # type: ignore[union-attr]
        return grads  # type: ignore[return-value]

    def _check_all(self, optimizer: str, grads: Sequence[Tensor]) -> None:
        for entry, grad in zip(self.entries, grads, strict=True):
            check_gradient(optimizer, entry, grad)


_data_ptr: Callable[[Tensor], int] = Tensor.data_ptr
_is_contiguous: Callable[[Tensor], bool] = Tensor.is_contiguous


def draft(optimizer: str, entries: Sequence[Entry]) -> Plan:
    """Find the parameters that have gradients, and check all of them.

    Raises:
        ValueError: as `Plan.gradients`.
    """
    present, absent, dtypes = [], [], []
    for entry in entries:
        grad = entry.gradient
        if grad is None:
            absent.append(entry)
            continue
        check_place(optimizer, entry)
        check_gradient(optimizer, entry, grad)
        present.append(entry)
        dtypes.append(grad.dtype)
    return Plan(present, absent, dtypes)
