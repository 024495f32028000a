"""Prompt passes: what a model is given for the prompts of some rows, and graphs of passes that come again.

A pass has the prompts one after another, without padding. Launching it takes longer than computing it where the tokens
are few; such a pass is captured when its sizes come a second time, with the prompts padded to one length.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpeft.models.decode.attention import Prompts
from fastpeft.models.decode.cache import PAGE_SIZE
from fastpeft.models.decode.graphs import Pool, captured

_MOST_TOKENS = 2048  # of a captured pass: on an H100 an 8B model then computes for 50 ms
_LENGTHS = 16  # are rounded up to a multiple of these
_MOST_PADDING = 2.0  # tokens of a captured pass over those of the prompts
_MOST_GRAPHS = 8


@dataclass(frozen=True)
class PromptPass:
    """What a model is given of prompts.

    Attributes:
        ids: ``(t,)`` int64 tokens.
        positions: ``(t,)`` int64, of each in its prompt.
        last: ``(b,)`` int64: where each prompt ends.
        prompts: where they lie, for attention.
    """

    ids: Tensor
    positions: Tensor
    last: Tensor
    prompts: Prompts


class _Graph:
    """A captured pass of ``count`` prompts of up to ``longest`` tokens, and what it reads."""

    def __init__(self, forward: Callable[[PromptPass], Tensor], count: int, longest: int, table: Tensor) -> None:
        device = table.device
        self._longest = longest
        self._ids = torch.zeros(count, longest, dtype=torch.int64, device=device)
        self._lengths = torch.ones(count, dtype=torch.int64, device=device)
        self._table = table.clone()
        place = torch.arange(longest, device=device)
        page = (place // PAGE_SIZE).clamp(max=table.shape[1] - 1)
        positions, offsets = place.repeat(count), (place % PAGE_SIZE).int().repeat(count)
        starts = torch.arange(count, device=device) * longest

        def run() -> Tensor:
            is_real = place < self._lengths[:, None]
            pages = torch.where(is_real, self._table[:, page], -1)
            prompts = Prompts(count, longest, None, pages.flatten(), offsets)
            return forward(PromptPass(self._ids.flatten(), positions, starts + self._lengths - 1, prompts))

        self._run = run
        self._graph: Any = None
        self._logits: Tensor | None = None

    def fill(self, prompts: Sequence[Sequence[int]], table: Tensor) -> None:
        """Put prompts where the pass reads them."""
        self._ids.copy_(torch.tensor([[*prompt, *[0] * (self._longest - len(prompt))] for prompt in prompts]))
        self._lengths.copy_(torch.tensor([len(prompt) for prompt in prompts]))
        self._table.copy_(table)

    def capture(self, pool: Pool) -> None:
        """Record the pass; it also runs, with what it was filled with."""
        self._graph, self._logits = captured(self._run, pool)

    def replay(self) -> Tensor:
        """Run the pass; the logits ``(b, v)`` are valid until the next."""
        assert self._logits is not None
        self._graph.replay()
        return self._logits


class PromptGraphs:
    """Captured passes by their sizes.

    Args:
        forward: runs the model, and gives the logits behind the prompts.
        pool: memory of the graphs.
    """

    def __init__(self, forward: Callable[[PromptPass], Tensor], pool: Pool) -> None:
        self._forward = forward
        self._pool = pool
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()
        self._times: Counter[tuple[int, int]] = Counter()
        self._is_refused = False

    def run(self, prompts: Sequence[Sequence[int]], table: Tensor) -> Tensor | None:
        """Run a pass that is worth a graph and has come before.

        Args:
            prompts: the tokens.
            table: ``(b, row_pages)`` int32, the pages of their rows.
        Returns:
            The logits behind the prompts, ``(b, v)``, valid until the next pass; None for a pass of another kind, which
            is to be run as it is.
        """
        lengths = [len(prompt) for prompt in prompts]
        longest = -(-max(lengths) // _LENGTHS) * _LENGTHS
        key, tokens = (len(lengths), longest), len(lengths) * longest
        if self._is_refused or tokens > _MOST_TOKENS or tokens > _MOST_PADDING * sum(lengths) + _LENGTHS:
            return None
        graph = self._graphs.pop(key, None)
        if graph is None:
            self._times[key] += 1
            if self._times[key] < 2:
                return None
            graph = self._captured(key, prompts, table)
            if graph is None:
                return None
            if len(self._graphs) == _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs[key] = graph
        graph.fill(prompts, table)
        return graph.replay()

    def _captured(self, key: tuple[int, int], prompts: Sequence[Sequence[int]], table: Tensor) -> _Graph | None:
        """None for a model that looks at values on the host; its steps warn of that."""
        graph = _Graph(self._forward, *key, table)
        graph.fill(prompts, table)
        try:
            graph.capture(self._pool)
        except RuntimeError:
            self._is_refused = True
            return None
        return graph
