"""How many numbers a model trains, and where."""

from __future__ import annotations

from torch import nn

from fastpeft.methods.saving import adapted_modules
from fastpeft.nn import NF4Module


def count(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all; a quantised weight counts by the numbers it stands for."""
    trainable = total = 0
    packed = {
        id(module.get_parameter(name)): nf4.numel
        for module in model.modules()
        if isinstance(module, NF4Module)
        for name, nf4 in module.packed.items()
    }
    for parameter in model.parameters():
        number = packed.get(id(parameter), parameter.numel())
        total += number
        trainable += number if parameter.requires_grad else 0
    return trainable, total


def adapter_bytes(model: nn.Module, adapter_name: str) -> int:
    """Memory that an adapter takes: its parameters, and what it keeps beside them.

    Args:
        model: a PeftModel.
        adapter_name: the adapter.
    """
    tensors = {}
    for _, module in adapted_modules(model):
        if adapter_name in module.held():
            parts = [*module.trainable(adapter_name), *module.extra_parameters(adapter_name)]
            tensors.update({id(tensor): tensor.nbytes for tensor in parts})
    return sum(tensors.values())


def table(model: nn.Module) -> str:
    """A line for each module that trains something: name, kind, numbers, and share of all trained.

    Args:
        model: a PeftModel.
    """
    rows: list[tuple[str, str, int]] = []
    seen: set[int] = set()
    for name, module in adapted_modules(model):
        parts = [p for held in module.held() for p in module.trainable(held) if p.requires_grad and id(p) not in seen]
        if parts:
            shown = name.removeprefix("base_model.model.").replace(".base_layer", "")
            rows.append((shown, type(module).__name__, sum(p.numel() for p in parts)))
            seen.update(id(p) for p in parts)
    rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in seen]
    rows += [(name.removeprefix("base_model.model."), "parameter", p.numel()) for name, p in rest]
    total = sum(row[2] for row in rows) or 1
    width = max((len(row[0]) for row in rows), default=0)
    lines = [f"{name:{width}}  {kind:20}  {n:>12,d}  {100 * n / total:6.2f}%" for name, kind, n in rows]
    return "\n".join(lines)
