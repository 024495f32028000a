"""Rows of a decoding batch: what the device keeps of each, and how requests come into rows and leave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from fastpeft.models.decode.cache import PagedCache, pages_for
from fastpeft.models.decode.options import DecodeOptions
from fastpeft.ops import SamplingState


@dataclass
class Request:
    """A prompt on its way.

    Attributes:
        index: its place among the prompts of the call.
        prompt: its tokens.
        options: how it is continued.
        seed: of its draws.
        virtual: tokens that stand before the prompt and are no text.
        pages: what it has of the cache while it is in a row.
        count: tokens that it was given so far.
    """

    index: int
    prompt: list[int]
    options: DecodeOptions
    seed: int
    virtual: int
    pages: list[int] = field(default_factory=list)
    count: int = 0

    @property
    def length(self) -> int:
        """Tokens before the first that is drawn."""
        return self.virtual + len(self.prompt)

    @property
    def page_count(self) -> int:
        """Pages it can need; the last token is fed too, as steps are started before the one before has been read."""
        return pages_for(self.length + self.options.max_new_tokens)


class Rows:
    """The device's side: a table of pages and the sampling state of ``size`` rows.

    Args:
        size: rows.
        row_pages: pages that a row can have.
        device: where they are.
        vocabulary: logits of a token, for rows with a repetition penalty; 0 where there are none.
    """

    def __init__(self, size: int, row_pages: int, device: torch.device, vocabulary: int) -> None:
        self.size = size
        self.row_pages = row_pages
        self.vocabulary = vocabulary
        self.device = device
        self.table = torch.zeros(size, row_pages, dtype=torch.int32, device=device)
        self.state = SamplingState.idle(size, device)
        if vocabulary:
            self.state.seen = torch.zeros(size, vocabulary, dtype=torch.bool, device=device)
        self.requests: list[Request | None] = [None] * size

    @property
    def active(self) -> list[int]:
        """Rows that have a request."""
        return [row for row, request in enumerate(self.requests) if request is not None]

    def begin(self, requests: Sequence[Request], cache: PagedCache) -> tuple[list[int], Tensor, SamplingState]:
        """Put requests into free rows.

        Returns:
            The rows, their pages ``(b, row_pages)``, and their state before the first draw, for `settle`.
        """
        rows = [row for row, request in enumerate(self.requests) if request is None][: len(requests)]
        table = torch.zeros(len(requests), self.row_pages, dtype=torch.int32)
        for place, (row, request) in enumerate(zip(rows, requests, strict=True)):
            self.requests[row] = request
            request.pages = cache.take(request.page_count)
            table[place, : request.page_count] = torch.tensor(request.pages, dtype=torch.int32)
        table = table.to(self.device)
        self.table[torch.tensor(rows, device=self.device)] = table
        return rows, table, self._first_state(requests)

    def _first_state(self, requests: Sequence[Request]) -> SamplingState:
        options = [request.options for request in requests]
        state = SamplingState.idle(len(requests), torch.device("cpu"))
        state.temperature = torch.tensor([o.temperature for o in options])
        state.top_p = torch.tensor([o.top_p for o in options])
        state.penalty = torch.tensor([o.repetition_penalty for o in options])
        state.top_k = torch.tensor([o.top_k for o in options], dtype=torch.int32)
        state.least = torch.tensor([o.min_new_tokens for o in options], dtype=torch.int32)
        state.seed = torch.tensor([request.seed for request in requests])
        # A draw counts the token fed before it; the one behind the prompt fed none of its own.
        state.lengths = torch.tensor([request.length - 1 for request in requests], dtype=torch.int32)
        if self.vocabulary:
            state.seen = torch.zeros(len(requests), self.vocabulary, dtype=torch.bool)
            for seen, request in zip(state.seen, requests, strict=True):
                seen[torch.tensor(request.prompt)] = True
        return state.each(lambda x: x.to(self.device))

    def settle(self, rows: Sequence[int], state: SamplingState) -> None:
        """Take over the state of some rows."""
        where = torch.tensor(rows, device=self.device)
        for each in fields(state):
            own = getattr(self.state, each.name)
            if own is not None:
                own[where] = getattr(state, each.name)

    def end(self, rows: Sequence[int], cache: PagedCache) -> None:
        """Let requests go: their rows are idle, their pages free."""
        for row in rows:
            request = self.requests[row]
            assert request is not None
            cache.give_back(request.pages)
            self.requests[row] = None
        self.state.lengths[torch.tensor(rows, device=self.device)] = -1

    def close_up(self) -> None:
        """Move all requests to the first rows, so that a smaller batch has them."""
        active = self.active
        order = active + [row for row in range(self.size) if self.requests[row] is None]
        where = torch.tensor(order, device=self.device)
        for x in (self.table, *(getattr(self.state, each.name) for each in fields(self.state))):
            if x is not None:
                x.copy_(x[where])
        self.requests = [self.requests[row] for row in order]
