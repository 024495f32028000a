"""Which layers of a model are packed into 4 bits; the same answer for a loaded model and for one still on ``meta``.

Left dense are the output embedding (its error goes straight into the logits, and it is often the input embedding too),
any weight that two modules share, and what the caller names. Experts that a model keeps in one three-dimensional
parameter are no linear layers, and stay dense too.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import UserError
from fastpeft.nn import Adapted, NF4Linear

PACKABLE = (nn.Linear, Conv1D)


def choose_layers(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Choose the layers to quantise, by full name.

    Args:
        model: a model without adapters; its weights are not read.
        skip: names of modules to leave dense with everything in them; a whole name or its last parts.
    Returns:
        ``nn.Linear`` and ``Conv1D`` layers, by full name.
    Raises:
        UserError: a name in ``skip`` matches nothing, there is nothing to quantise, or the model has adapters.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if any(isinstance(module, Adapted) for module in modules.values()):
        raise UserError("quantize: the model has adapters; quantise first and add adapters then (get_peft_model)")
    skipped = {name for entry in skip for name in _named(entry, modules)}
    head = _output_embedding(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    uses = Counter(_memory(p) for module in model.modules() for p in module.parameters(recurse=False))
    chosen = {
        name: module
        for name, module in modules.items()
        if type(module) in PACKABLE
        and module is not head
        and uses[_memory(module.weight)] == 1  # type: ignore[arg-type]
        and f"{name}.weight" not in tied
        and f"{name}.weight" not in tied.values()
        and not any(name == outer or name.startswith(f"{outer}.") for outer in skipped)
    }
    if not chosen and not skipped and not any(isinstance(module, NF4Linear) for module in modules.values()):
        raise UserError(
            f"quantize: {type(model).__name__} has no torch.nn.Linear to quantise besides the output embedding and "
            "shared weights; is it quantised by another library?"
        )
    return chosen


def _memory(parameter: torch.Tensor) -> int:
    """What two parameters that share a weight have in common."""
    return parameter.data_ptr() or id(parameter)  # a meta tensor has no address


def _named(entry: str, modules: Iterable[str]) -> list[str]:
    modules = list(modules)
    names = [name for name in modules if name == entry or name.endswith(f".{entry}")]
    if not names:
        leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
        near = difflib.get_close_matches(entry, [*leaves, *modules], n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"names end in: {', '.join(leaves[:12])}"
        raise UserError(f"quantize: skip names '{entry}', which matches no module of the model; {hint}")
    return names


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None
