"""Which parameters step together: made once, and again only when other parameters have gradients than before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastpeft.ops.adamw import AdamWList
from fastpeft.optim.parameter import Entry, check_gradient, follow


@dataclass
class Batch:
    """Parameters that one launch updates.

    Attributes:
        group: number of their group.
        device: where they are.
        grad_dtype: of their gradients.
        rows: of the native core; each a parameter or a piece of one.
        members: for each row the place of its parameter's gradient among the step's gradients.
        addresses: for each row the address of that gradient, as of the last step.
    """

    group: int
    device: torch.device
    grad_dtype: torch.dtype
    rows: AdamWList
    members: list[int]
    addresses: list[int] = field(default_factory=list)


@dataclass
class Norm:
    """Gradients of one device, by dtype, for the norm of all.

    Attributes:
        dtypes: of each list.
        members: places of the gradients of each list among the step's gradients.
        numels: their sizes.
    """

    dtypes: list[torch.dtype] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    numels: list[list[int]] = field(default_factory=list)


@dataclass
class Plan:
    """What a step does, as long as the same parameters have gradients of the same dtypes.

    Attributes:
        entries: the parameters that have a gradient.
        absent: those that have none.
        dtypes: of the gradients.
        batches: in the order they are stepped.
        norms: by device.
        states: how many parameters had state when the plan was made.
        addresses: of the gradients of the last step.
    """

    entries: list[Entry]
    absent: list[Entry]
    dtypes: list[torch.dtype]
    batches: list[Batch] = field(default_factory=list)
    norms: dict[torch.device, Norm] = field(default_factory=dict)
    states: int = 0
    addresses: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._params = [entry.param for entry in self.entries]
        self._absent = [entry.param for entry in self.absent]
        self._locals = [entry.local for entry in self.entries]
        self._local_addresses = [entry.address for entry in self.entries]
        self._distributed = any(entry.distributed for entry in self.entries)
        self._made: list[Tensor] = []  # gradients that are no parameter's own: copies, and parts of DTensors
        for place, (entry, dtype) in enumerate(zip(self.entries, self.dtypes, strict=True)):
            norm = self.norms.setdefault(entry.device, Norm())
            if dtype not in norm.dtypes:
                norm.dtypes.append(dtype)
                norm.members.append([])
                norm.numels.append([])
            which = norm.dtypes.index(dtype)
            norm.members[which].append(place)
            norm.numels[which].append(entry.shape.numel())

    def take_gradients(self, optimizer: str) -> bool:
        """Note where the gradients of this step are, checked; False when another plan is needed.

        What is checked anew for every tensor is little, as there may be hundreds and a step must not wait for Python:
        its address, and whether it is contiguous. Only where an address changed is the rest looked at, which torch
        sees to itself where a gradient is made by autograd.

        Raises:
            ValueError: a parameter was changed, or a gradient cannot be taken; nothing was updated.
        """
        for param in self._absent:
            if param.grad is not None:
                return False
        grads: Sequence[Tensor | None]
        if self._distributed:
            grads = [entry.gradient for entry in self.entries]
        else:
            grads = [param.grad for param in self._params]
        try:
            addresses = list(map(_data_ptr, grads))  # type: ignore[arg-type]
            contiguous = all(map(_is_contiguous, grads))  # type: ignore[arg-type]
        except (TypeError, RuntimeError):  # None or sparse; the new plan says which
            return False
        if self._distributed or list(map(_data_ptr, self._locals)) != self._local_addresses:
            moved = [follow(optimizer, entry) for entry in self.entries]
            if any(moved):
                return False
        if self._distributed or not contiguous:
            self._made = [grad.contiguous() for grad in grads if grad is not None]
            grads, addresses = self._made, list(map(_data_ptr, self._made))
        if addresses != self.addresses:
            for entry, grad, dtype in zip(self.entries, grads, self.dtypes, strict=True):
                assert grad is not None
                check_gradient(optimizer, entry, grad)
                if grad.dtype != dtype:
                    return False
            self.addresses = addresses
            for batch in self.batches:
                batch.addresses = [addresses[place] for place in batch.members]
        return True

    def release(self) -> None:
        """Let go of what the step needed besides the parameters' own gradients; the launches are behind it."""
        self._made = []

    def set_batches(self, batches: list[Batch], states: int) -> None:
        """Say what the launches are."""
        self.batches, self.states = batches, states
        for batch in batches:
            batch.addresses = [self.addresses[place] for place in batch.members]


_data_ptr: Callable[[Tensor], int] = Tensor.data_ptr
_is_contiguous: Callable[[Tensor], bool] = Tensor.is_contiguous


def draft(optimizer: str, entries: Sequence[Entry]) -> Plan:
    """Find the parameters that have gradients, and check all of them.

    Raises:
        ValueError: as `Plan.take_gradients`.
    """
    present, absent, dtypes = [], [], []
    for entry in entries:
        grad = entry.gradient
        if grad is None:
            absent.append(entry)
            continue
        follow(optimizer, entry)
        check_gradient(optimizer, entry, grad)
        present.append(entry)
        dtypes.append(grad.dtype)
    return Plan(present, absent, dtypes)
