"""Which layers of a model are packed into 4 bits; the same answer for a loaded model and for one still on ``meta``.

Left dense are the output embedding (its error goes straight into the logits, and it is often the input embedding too),
any weight that two modules share, and what the caller names. The experts of a mixture, which transformers keeps as two
three-dimensional parameters of one module, are packed as one layer; those of another form (`is_experts`) stay dense.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import UserError
from fastpeft.nn import Adapted, NF4Module
from fastpeft.nn.experts import EXPERT_WEIGHTS, is_experts
from fastpeft.nn.nf4_experts import whole_blocks

LINEAR = (nn.Linear, Conv1D)


def is_packable(module: nn.Module) -> bool:
    """Whether a module is of a kind that can be packed: a linear layer, no subclass of one, or a mixture's experts."""
    return type(module) in LINEAR or is_experts(module)


def weights_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """What of a packable layer is packed, by its name in it."""
    names = ("weight",) if type(layer) in LINEAR else EXPERT_WEIGHTS
    return {name: getattr(layer, name) for name in names}


def weight_names(layers: Mapping[str, nn.Module]) -> list[str]:
    """Full names of what is packed.

    Args:
        layers: packable ones by full name.
    """
    return [f"{name}.{weight}" for name, layer in layers.items() for weight in weights_of(layer)]


def choose_layers(model: nn.Module, skip: Iterable[str] = (), block_size: int = 64) -> dict[str, nn.Module]:
    """Choose the layers to quantise, by full name.

    Args:
        model: a model without adapters; its weights are not read.
        skip: names of modules to leave dense with everything in them; a whole name or its last parts.
        block_size: weights that share a scale; experts whose parts are not made of whole blocks are left dense.
    Returns:
        ``nn.Linear`` and ``Conv1D`` layers and mixtures' experts, by full name.
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
        if is_packable(module)
        and module is not head
        and not any(name == outer or name.startswith(f"{outer}.") for outer in skipped)
        and not any(
            uses[_memory(weight)] > 1
            or f"{name}.{part}" in tied
            or f"{name}.{part}" in tied.values()
            or (weight.dim() == 3 and not whole_blocks(weight.shape, block_size))
            for part, weight in weights_of(module).items()
        )
    }
    if not chosen and not skipped and not any(isinstance(module, NF4Module) for module in modules.values()):
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
