"""Walk a model and put other modules where its linear layers are."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers.pytorch_utils import Conv1D


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
    return replace_modules(model, (nn.Linear,), make, where)  # type: ignore[arg-type]  # the kind narrows the type


def replace_modules(
    model: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    make: Callable[[nn.Module], nn.Module],
    where: Callable[[str, nn.Module], bool] = lambda name, module: True,
) -> list[str]:
    """Replace modules of some kinds one by one, as ``replace_linear`` does.

    Args:
        model: changed in place; itself never replaced.
        kinds: classes; their subclasses count too.
        make: builds the replacement from a module.
        where: chooses modules by full name (the first, for one in several places) and module.
    Returns:
        Full names of the replaced modules.
    """
    replaced = []
    for names in _places(model, kinds, where):
        new = make(model.get_submodule(names[0]))
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
        replaced += names
    return replaced


def _places(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], where: Callable[[str, nn.Module], bool]
) -> list[list[str]]:
    """All names of each chosen module; names only, because a reference to one would keep its weight alive."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, kinds) and (id(module) in places or where(name, module)):
            places.setdefault(id(module), []).append(name)
    return list(places.values())


def linear_sizes(layer: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a ``nn.Linear``, or of a ``Conv1D`` (GPT-2's linear layer, transposed)."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features
