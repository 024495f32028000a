"""Walk a model and put other modules where its linear layers are."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_linear(
    model: nn.Module,
    make: Callable[[nn.Linear], nn.Module],
    where: Callable[[str, nn.Linear], bool] = lambda name, linear: True,
) -> list[str]:
    """Replace linear layers one by one.

    A layer is let go of before ``make`` sees the next one, so that a replacement that needs less memory frees the
    difference at once. A layer that stands in several places is made once and put into all of them.

    Args:
        model: changed in place; itself never replaced.
        make: builds the replacement from a layer.
        where: chooses layers by full name (the first, for one in several places) and layer.
    Returns:
        Full names of the replaced layers.
    """
    replaced = []
    for names in _places(model, where):
        new = make(_linear_at(model, names[0]))
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
        replaced += names
    return replaced


def _places(model: nn.Module, where: Callable[[str, nn.Linear], bool]) -> list[list[str]]:
    """All names of each chosen layer; names only, because a reference to a layer would keep its weight alive."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, nn.Linear) and (id(module) in places or where(name, module)):
            places.setdefault(id(module), []).append(name)
    return list(places.values())


def _linear_at(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
