"""Adapted: what every module that holds adapters has in common.

An adapter is a name; a module holds tensors for some names. Which of them act is decided from outside: by
``active_adapters``, by ``adapters_disabled``, and, for one forward pass over a mixed batch, by ``routing``, which names
one adapter for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError

BASE = "__base__"  # in a routing: a sample that no adapter touches


class Adapted(nn.Module):
    """A module with adapters by name.

    Attributes:
        active_adapters: names that act, in order; those the module lacks are passed over.
        adapters_disabled: act as the base.
        routing: for each sample the name that acts on it, in place of ``active_adapters``; None for no mixed batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active_adapters: list[str] = []
        self.adapters_disabled = False
        self.routing: tuple[str, ...] | None = None

    def held(self) -> list[str]:
        """Names of the adapters that this module holds."""
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; names the module does not hold are ignored."""
        raise NotImplementedError

    def parts(self, adapter_name: str) -> dict[str, str]:
        """The adapter's tensors that are saved: own name, and the last part of the key in its file."""
        raise NotImplementedError

    def trainable(self, adapter_name: str) -> list[nn.Parameter]:
        """The adapter's parameters that training changes."""
        return [part for name in self.parts(adapter_name) if isinstance(part := self._at(name), nn.Parameter)]

    def extra_parameters(self, adapter_name: str) -> list[Tensor]:
        """Tensors that the adapter needs beside the trained ones; they count for memory."""
        return []

    def set_dropout(self, p: float) -> None:
        """Give all adapters of this module another dropout, such as 0 where a loss compares two passes."""

    def saved(self, adapter_name: str, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors by the last part of their key.

        Args:
            adapter_name: an adapter that is held.
            get: gives an own tensor by its name in this module.
        """
        return {tail: get(name) for name, tail in self.parts(adapter_name).items()}

    def saved_shapes(self, adapter_name: str) -> dict[str, tuple[int, ...]]:
        """Shapes of what ``saved`` gives."""
        return {tail: tuple(tensor.shape) for tail, tensor in self.saved(adapter_name, self._at).items()}

    def as_saved(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors of this adapter, made whole where another library's files hold less."""
        return dict(tensors)

    @torch.no_grad()
    def load(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite an adapter's values, in place.

        Args:
            adapter_name: an adapter that is held.
            tensors: by the last part of their key; those that are absent keep their values.
        """
        for name, tail in self.parts(adapter_name).items():
            if tail in tensors:
                self._at(name).copy_(tensors[tail])

    def working(self) -> list[str]:
        """Names of the held adapters that act now, where no routing is set."""
        held = self.held()
        return [] if self.adapters_disabled else [name for name in self.active_adapters if name in held]

    def routes(self, samples: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """For each held adapter that the routing names, the rows of a batch that it acts on.

        Args:
            samples: rows of the batch; a multiple of the routing's length where each sample has several (beams,
                tokens).
            device: where to put the rows.
        Yields:
            Name and row numbers.
        """
        assert self.routing is not None
        if self.adapters_disabled:
            return
        times, rest = divmod(samples, len(self.routing))
        if rest or not times:
            raise UserError(
                f"adapter_names has {len(self.routing)} entries and the batch {samples} rows; give one name a sample"
            )
        held = self.held()
        for name in dict.fromkeys(self.routing):
            if name in held:
                rows = [i * times + j for i, at in enumerate(self.routing) if at == name for j in range(times)]
                yield name, torch.tensor(rows, device=device)

    def _at(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(self.get_submodule(owner), leaf)
        assert isinstance(tensor, Tensor)
        return tensor


_in_force: list[tuple[Sequence[Adapted], tuple[str, ...]]] = []  # the routings that are set, the last one innermost


@contextmanager
def routed(modules: Sequence[Adapted], names: tuple[str, ...]) -> Iterator[None]:
    """Let each sample of a batch have its own adapter within the block.

    Args:
        modules: of one model.
        names: an adapter, or ``BASE``, for each sample.
    """
    before = [module.routing for module in modules]
    _in_force.append((modules, names))
    try:
        for module in modules:
            module.routing = names
        yield
    finally:
        _in_force.pop()
        for module, routing in zip(modules, before, strict=True):
            module.routing = routing


def routing_again() -> Callable[[], AbstractContextManager[None]]:
    """What sets the routing of now once more, for layers that run again in backward."""
    return partial(routed, *_in_force[-1]) if _in_force else nullcontext


def on_rows(y: Tensor, x: Tensor, routes: Iterator[tuple[str, Tensor]], delta: Callable[..., Tensor]) -> Tensor:
    """Add to some rows of a batch what their adapter gives.

    Args:
        y: ``(samples, ...)``, outputs of the base.
        x: ``(samples, ...)``, inputs.
        routes: adapters with their rows.
        delta: gives an adapter's share from its name, its inputs and its outputs of the base.
    Returns:
        ``y`` with all shares added, in its dtype.
    """
    for name, rows in routes:
        share = delta(name, x.index_select(0, rows), y.index_select(0, rows))
        y = y.index_add(0, rows, share.to(y.dtype))
    return y
