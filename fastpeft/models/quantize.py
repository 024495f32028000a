"""Quantise a loaded model in place: ``nn.Linear`` becomes ``NF4Linear``, one layer at a time.

A dense weight is freed before the next one is quantised, so the peak is the loaded model plus the work of one layer,
and the model shrinks from there. Left dense are the output embedding (its error goes straight into the logits, and it
is often the input embedding too), any weight that two modules share, and what the caller names.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable
from typing import TypeVar

import torch
from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.replace import replace_linear
from fastpeft.nn import Adapted, NF4Linear
from fastpeft.ops.nf4_weight import BLOCK_SIZES

_Model = TypeVar("_Model", bound=nn.Module)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize(model: _Model, *, block_size: int = 64, double_quant: bool = True, skip: Collection[str] = ()) -> _Model:
    """Replace a model's linear layers by 4-bit ones, in place.

    Layers that are quantised already stay as they are, so a second call does nothing.

    Args:
        model: a loaded model without adapters.
        block_size: weights that share a scale, a power of two from 32 to 4096.
        double_quant: quantise the scales too (0.37 bit a weight less at block size 64).
        skip: names of modules to leave dense with everything in them; a whole name or its last parts ("down_proj",
            "layers.0").
    Returns:
        The same model.
    Raises:
        UserError: a name in ``skip`` matches nothing, there is nothing to quantise, or the model has adapters, weights
            on the meta device, or a dtype that NF4 is not made from. The model is left as it was.
    Source:
        QLoRA, arXiv 2305.14314.
    """
    if block_size not in BLOCK_SIZES:
        raise UserError(f"quantize: block_size={block_size}; must be one of {', '.join(map(str, BLOCK_SIZES))}")
    skip = [skip] if isinstance(skip, str) else list(skip)
    chosen = _choose(model, skip)
    replace_linear(
        model,
        lambda linear: NF4Linear.from_linear(linear, block_size, double_quant).train(linear.training),
        lambda name, _: name in chosen,
    )
    return model


def _choose(model: nn.Module, skip: Iterable[str]) -> set[str]:
    """Check everything that can go wrong, and name the layers to quantise."""
    modules = {name: module for name, module in model.named_modules() if name}
    if any(isinstance(module, Adapted) for module in modules.values()):
        raise UserError("quantize: the model has adapters; quantise first and add adapters then (get_peft_model)")
    skipped = {name for entry in skip for name in _named(entry, modules)}
    head = _output_embedding(model)
    uses = Counter(_memory(p) for module in model.modules() for p in module.parameters(recurse=False))
    chosen = {
        name: module
        for name, module in modules.items()
        if type(module) is nn.Linear
        and module is not head
        and uses[_memory(module.weight)] == 1
        and not any(name == outer or name.startswith(f"{outer}.") for outer in skipped)
    }
    if not chosen and not skipped and not any(isinstance(module, NF4Linear) for module in modules.values()):
        raise UserError(
            f"quantize: {type(model).__name__} has no torch.nn.Linear to quantise besides the output embedding and "
            "shared weights; is it quantised by another library?"
        )
    for name, linear in chosen.items():
        if linear.weight.is_meta:
            raise UserError(
                f"quantize: the weight of '{name}' is on the meta device (not loaded, or offloaded); load the model "
                "whole first"
            )
        if linear.weight.dtype not in _DTYPES:
            raise UserError(
                f"quantize: '{name}' is {linear.weight.dtype}; NF4 is made from float32, float16 or bfloat16, load the "
                f"model with one of these dtypes or name the layer in skip"
            )
    return set(chosen)


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
