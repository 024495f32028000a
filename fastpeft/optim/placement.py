"""Where the state of paged optimizers lies: arithmetic alone, no tensor and no device.

The state of a device's parameters fills an arena, one parameter after the other, in cells of equal size::

    cell 0           cell 1           cell 2           cell 3
    | a | b | c c c c|c c c c c c c c |c c | d | e e e |e e  |
    near: the first cells             ^ far: the others

A parameter that does not fit what is left of a cell goes on in the next: each cell holds a piece of it, which is
stepped by itself. In a piece its first moments, its second moments and, with 8-bit state, the scales of either follow
each other, so that a cell is one range of bytes and a transfer each way moves it. Pieces begin at multiples of 256
elements of their parameter, where blocks of 8-bit state do. What is near can be given in one number, and changing it
moves whole cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 256  # elements
_ALIGNMENT = 256  # bytes
CELL_BYTES = 16 << 20  # of the largest cells: what a slot of the copy pipeline takes
_FEWEST_CELLS = 32  # small arenas have smaller cells, so that a budget is met within a few per cent


@dataclass(frozen=True)
class Piece:
    """Elements of a parameter whose state lies together.

    Attributes:
        parameter: its place in the list of parameters.
        begin: first element.
        numel: how many.
        cell: where it lies.
        at: first byte, in the arena.
    """

    parameter: int
    begin: int
    numel: int
    cell: int
    at: int


@dataclass(frozen=True)
class Range:
    """Bytes of an arena."""

    begin: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """An arena and what lies where in it.

    Attributes:
        eight_bit: codes of a byte with scales, instead of float32.
        pieces: in the order of their bytes.
        cell_bytes: size of a cell, whole pages; the last one may be smaller.
        nbytes: size of the arena, whole pages.
    """

    eight_bit: bool
    pieces: tuple[Piece, ...]
    cell_bytes: int
    nbytes: int

    @property
    def cells(self) -> int:
        """How many there are."""
        return -(-self.nbytes // self.cell_bytes)

    def near_bytes(self, cells: int) -> int:
        """Bytes of the first cells."""
        return min(cells * self.cell_bytes, self.nbytes)

    def cells_within(self, budget: int) -> int:
        """How many cells take no more than ``budget`` bytes."""
        return self.cells if budget >= self.nbytes else budget // self.cell_bytes

    def ranges(self, piece: Piece) -> tuple[Range, ...]:
        """Where a piece's first and second moments lie, and with 8-bit state the scales of either."""
        padded = _padded(piece.numel)
        if not self.eight_bit:
            return Range(piece.at, 4 * piece.numel), Range(piece.at + 4 * padded, 4 * piece.numel)
        scales = padded // BLOCK * 4
        codes = piece.at + 2 * padded
        return (
            Range(piece.at, piece.numel),
            Range(piece.at + padded, piece.numel),
            Range(codes, scales),
            Range(codes + scales, scales),
        )


def lay_out(numels: Sequence[int], eight_bit: bool, page_bytes: int) -> Layout:
    """Give every parameter its place.

    Args:
        numels: sizes of the parameters; one of 0 elements has no piece.
        eight_bit: codes of a byte with scales, instead of float32.
        page_bytes: size of a page.
    """
    block_bytes = 2 * BLOCK + 8 if eight_bit else 8 * BLOCK
    total = sum(_padded(numel) // BLOCK * block_bytes for numel in numels)
    cell_bytes = page_bytes * min(CELL_BYTES // page_bytes, max(1, total // page_bytes // _FEWEST_CELLS))
    pieces: list[Piece] = []
    at = 0
    for parameter, numel in enumerate(numels):
        begin = 0
        while begin < numel:
            cell, within = divmod(at, cell_bytes)
            fit = (cell_bytes - within) // block_bytes * BLOCK
            if fit == 0:
                at = (cell + 1) * cell_bytes
                continue
            count = min(fit, numel - begin)
            pieces.append(Piece(parameter, begin, count, cell, at))
            used = _padded(count) // BLOCK * block_bytes
            at += -(-used // _ALIGNMENT) * _ALIGNMENT
            begin += count
    nbytes = -(-at // page_bytes) * page_bytes
    return Layout(eight_bit, tuple(pieces), cell_bytes, nbytes)


def room(free: int, reserve: int, near: int, wanted: int) -> int:
    """How many bytes of state may be near now.

    State comes back in steps of at least an eighth of what is missing (or 64 MiB, if that is less), so that a few bytes
    given back by others do not start a transfer at every step.

    Args:
        free: bytes that the device has left.
        reserve: bytes to leave to others.
        near: bytes that are near already; they stay: they leave by `evict` and a lower budget alone.
        wanted: bytes that the budget allows.
    """
    missing = wanted - near
    more = min(missing, free - reserve)
    return near + more if more >= min(missing // 8, 64 << 20) else min(near, wanted)


def _padded(numel: int) -> int:
    return -(-numel // BLOCK) * BLOCK
