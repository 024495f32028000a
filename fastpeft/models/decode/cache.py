"""Keys and values of many rows in pages of equal size, so that rows of any lengths share one piece of memory.

A row takes all pages it can need when it begins and gives them back when it ends: nothing runs out halfway.
"""

from __future__ import annotations

from torch import Tensor

PAGE_SIZE = 64  # tokens


def pages_for(tokens: int) -> int:
    """How many pages hold some tokens."""
    return -(-tokens // PAGE_SIZE)


class PagedCache:
    """Pages of each layer, and which of them are free.

    Args:
        pages: how many. Layers get theirs when they first write, by the sizes and on the device they write.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take free pages; there must be as many."""
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Give pages back."""
        self._free.extend(reversed(pages))

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Pages of a layer, ``(pages, kv_heads, page_size, d)`` each.

        Args:
            index: of the layer.
            like: keys ``(..., kv_heads, n, d)`` of it.
        """
        if index not in self._layers:
            shape = (self.pages, like.shape[-3], PAGE_SIZE, like.shape[-1])
            self._layers[index] = (like.new_empty(shape), like.new_empty(shape))
        return self._layers[index]

    @property
    def nbytes(self) -> int:
        """What all pages take."""
        return sum(x.nbytes for both in self._layers.values() for x in both)
