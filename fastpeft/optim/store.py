"""An arena of state, and the views of it that steps and state dicts work on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastpeft.ops.arena import Arena
from fastpeft.optim import placement
from fastpeft.optim.parameter import Entry

_SLOT_BYTES = placement.CELL_BYTES + (4 << 10)  # a cell, and what its ranges may lose to alignment


class Store:
    """The state of some parameters of one device, in an arena of which the first cells are on the device.

    Args:
        entries: the parameters.
        eight_bit: hold codes with scales, instead of float32.
        mode: of the arena.
    """

    def __init__(self, entries: Sequence[Entry], eight_bit: bool, mode: Literal["managed", "pinned"]) -> None:
        self.device = entries[0].device
        self.eight_bit = eight_bit
        numels = [entry.shape.numel() for entry in entries]
        self.layout = placement.lay_out(numels, eight_bit, Arena.page_bytes)
        self.arena = Arena(self.layout.nbytes, self.device, mode, slot_bytes=_SLOT_BYTES)
        self.near_cells = 0
        self.pieces: dict[Entry, list[placement.Piece]] = {entry: [] for entry in entries}
        for piece in self.layout.pieces:
            self.pieces[entries[piece.parameter]].append(piece)
        self._views: list[Tensor] | None = None

    @property
    def near_bytes(self) -> int:
        """Bytes that are on the device."""
        return self.layout.near_bytes(self.near_cells)

    @property
    def is_far(self) -> bool:
        """Whether some of it is on the host."""
        return self.near_cells < self.layout.cells

    def move_to(self, cells: int) -> None:
        """Have the first ``cells`` on the device and the others on the host, behind the current stream's work."""
        old, new = self.near_bytes, self.layout.near_bytes(cells)
        first, last = min(old, new) // Arena.page_bytes, max(old, new) // Arena.page_bytes
        self._views = None
        self.arena.move(first, last - first, "device" if new > old else "host")
        self.near_cells = cells

    def tensors(self, piece: placement.Piece) -> tuple[Tensor, ...]:
        """The state of a piece, flat, where it lies; good until cells move."""
        if self._views is None:
            near, all_of_it = self.near_bytes, self.layout.nbytes
            self._views = [self.arena.view(0, near), self.arena.view(near, all_of_it - near)]
        far = piece.cell >= self.near_cells
        base = self.near_bytes if far else 0
        found = []
        for index, part in enumerate(self.layout.ranges(piece)):
            raw = self._views[far][part.begin - base : part.begin - base + part.nbytes]
            found.append(raw if self.eight_bit and index < 2 else raw.view(torch.float32))
        return tuple(found)
