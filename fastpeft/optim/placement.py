"""Where the state of paged optimizers lies: arithmetic alone, no tensor and no device.

All moments of a device's parameters lie in one arena, in bands: one of first moments, one of second moments, and for
8-bit state one of the scales of each. Every band holds the parameters one after the other, each from a multiple of 256
elements on (so that blocks of 8-bit state start with it, and accesses of 16 bytes are aligned)::

    exp_avg     | a a a a | b b | c c c c c c |        near: the elements before a limit, the same one in every band
    exp_avg_sq  | a a a a | b b | c c c c c c |        far:  those behind it
                             ^ limit

So at most one parameter is cut in two, and the limit moves by whole pages of the widest band. A page of another band
that holds elements of both sides is near: at most a page a band more than the budget counts exactly, which `near_bytes`
includes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 256  # elements; what parameters are aligned to


@dataclass(frozen=True)
class Band:
    """A run of pages that holds one kind of state of all parameters.

    Attributes:
        begin: its first byte in the arena, at a page.
        nbytes: its size, whole pages.
        item: bytes of an entry.
        per_item: elements that share an entry: 1, or 256 for scales.
    """

    begin: int
    nbytes: int
    item: int
    per_item: int

    def at(self, element: int) -> int:
        """Byte of the arena where an element's entry lies; elements are multiples of ``per_item``."""
        return self.begin + element // self.per_item * self.item

    def size(self, elements: int) -> int:
        """Bytes of the entries of so many elements."""
        return -(-elements // self.per_item) * self.item


@dataclass(frozen=True)
class Run:
    """Consecutive pages that go to one place."""

    first_page: int
    pages: int


@dataclass(frozen=True)
class Layout:
    """The bands of an arena, and where each parameter begins in them.

    Attributes:
        starts: first element of each parameter.
        elements: of all parameters together, with the gaps between them.
        bands: in the order first moment, second moment, scales of the first, scales of the second.
        page_bytes: size of a page.
    """

    starts: tuple[int, ...]
    elements: int
    bands: tuple[Band, ...]
    page_bytes: int

    @property
    def nbytes(self) -> int:
        """Size of the arena."""
        return self.bands[-1].begin + self.bands[-1].nbytes

    @property
    def grain(self) -> int:
        """Elements by which the limit moves: a page of the first moment."""
        return self.page_bytes // self.bands[0].item

    def limits(self) -> range:
        """Every place where the limit between near and far can be, but for the end."""
        return range(0, self.elements, self.grain)

    def near_bytes(self, limit: int) -> int:
        """Bytes of the pages that are near when the elements before ``limit`` are."""
        return sum(self._pages(band, limit) for band in self.bands) * self.page_bytes

    def limit_within(self, budget: int) -> int:
        """The largest limit whose near pages take no more than ``budget`` bytes."""
        if self.near_bytes(self.elements) <= budget:
            return self.elements
        low, high = 0, -(-self.elements // self.grain)  # in grains: low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            if self.near_bytes(min(middle * self.grain, self.elements)) <= budget:
                low = middle
            else:
                high = middle
        return low * self.grain

    def moves(self, old: int, new: int) -> list[Run]:
        """The pages that change their place when the limit moves, a run a band."""
        runs = []
        for band in self.bands:
            before, after = self._pages(band, old), self._pages(band, new)
            if before != after:
                runs.append(Run(band.begin // self.page_bytes + min(before, after), abs(after - before)))
        return runs

    def cut(self, index: int, numel: int, limit: int) -> int:
        """How many of a parameter's elements are near."""
        return min(max(limit - self.starts[index], 0), numel)

    def _pages(self, band: Band, limit: int) -> int:
        return -(-band.size(limit) // self.page_bytes)


def lay_out(numels: Sequence[int], eight_bit: bool, page_bytes: int) -> Layout:
    """Give every parameter its place.

    Args:
        numels: sizes of the parameters.
        eight_bit: codes of a byte with scales, instead of float32.
        page_bytes: size of a page.
    """
    starts, elements = [], 0
    for numel in numels:
        starts.append(elements)
        elements += -(-numel // BLOCK) * BLOCK
    bands: list[Band] = []
    begin = 0
    for item, per_item in [(1, 1), (1, 1), (4, BLOCK), (4, BLOCK)] if eight_bit else [(4, 1), (4, 1)]:
        pages = -(-(elements // per_item * item) // page_bytes)
        bands.append(Band(begin, pages * page_bytes, item, per_item))
        begin += pages * page_bytes
    return Layout(tuple(starts), elements, tuple(bands), page_bytes)


def room(free: int, reserve: int, near: int, wanted: int, page_bytes: int) -> int:
    """How many bytes of state may be near now.

    State comes back in steps of an eighth of what is missing (or 64 MiB, if that is less), so that a few bytes given
    back by others do not start a transfer at every step.

    Args:
        free: bytes that the device has left.
        reserve: bytes to leave to others.
        near: bytes that are near already; they stay, pages leave by `evict` and a lower budget alone.
        wanted: bytes that the budget allows.
        page_bytes: size of a page.
    """
    if wanted <= near:
        return wanted
    more = min(wanted - near, max(0, free - reserve))
    step = min(-(-(wanted - near) // 8), 64 << 20)
    return near + more if more >= max(step, page_bytes) or more == wanted - near else near
