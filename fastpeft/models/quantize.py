"""Quantise a loaded model in place: ``nn.Linear`` becomes ``NF4Linear``, a mixture's experts ``NF4Experts``, one layer
at a time; and the way back.

A dense weight is freed before the next one is quantised, so the peak is the loaded model plus the work of one layer,
and the model shrinks from there. ``choose`` says which layers; a model quantised here saves like one that was
quantised while it was loaded (``nf4_quantizer``).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import UserError
from fastpeft.models.choose import LINEAR, choose_layers, weights_of
from fastpeft.models.nf4_config import NF4Config
from fastpeft.models.nf4_quantizer import forget_quantizer, remember_quantizer
from fastpeft.models.replace import replace_modules
from fastpeft.nn import NF4Experts, NF4Linear, NF4Module
from fastpeft.ops import nf4_quantize
from fastpeft.ops.nf4_weight import BLOCK_SIZES

_Model = TypeVar("_Model", bound=nn.Module)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize(model: _Model, *, block_size: int = 64, double_quant: bool = True, skip: Collection[str] = ()) -> _Model:
    """Replace a model's linear layers, and the experts of a mixture, by 4-bit ones, in place.

    Layers that are quantised already stay as they are, so a second call does nothing. ``save_pretrained`` of a Hugging
    Face model writes a bitsandbytes checkpoint afterwards.

    Args:
        model: a loaded model without adapters.
        block_size: weights that share a scale, a power of two from 32 to 4096.
        double_quant: quantise the scales too (0.37 bit a weight less at block size 64).
        skip: names of modules to leave dense with everything in them; a whole name or its last parts ("down_proj",
            "layers.0", "experts").
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
    chosen = choose_layers(model, skip, block_size)
    _check_weights(chosen)
    names = set(chosen)
    del chosen  # it would keep every dense weight alive

    def pack(layer: nn.Module) -> nn.Module:
        if type(layer) not in LINEAR:
            return NF4Experts.from_experts(layer, block_size, double_quant)
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        nf4 = nf4_quantize(weight, block_size, double_quant)  # type: ignore[arg-type]
        return NF4Linear(nf4, layer.bias).train(layer.training)  # type: ignore[arg-type]

    replace_modules(model, (nn.Module,), pack, lambda name, _: name in names)
    if names and isinstance(model, PreTrainedModel):
        remember_quantizer(model, NF4Config(block_size=block_size, double_quant=double_quant, skip_modules=skip))
    return model


def dequantize(model: _Model, dtype: torch.dtype | None = None) -> _Model:
    """Replace a model's 4-bit layers by dense ones with the values that they stand for, in place, layer by layer.

    Args:
        model: a model without adapters.
        dtype: of the dense weights; None for the one each was quantised from.
    Returns:
        The same model; its configuration no longer says that it is quantised.
    """

    def unpack(layer: nn.Module) -> nn.Module:
        if isinstance(layer, NF4Experts):
            return layer.to_dense(dtype)
        assert isinstance(layer, NF4Linear)
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
        dense.register_parameter("bias", layer.bias)
        return dense.train(layer.training)

    replace_modules(model, (NF4Module,), unpack)
    if isinstance(model, PreTrainedModel):
        forget_quantizer(model)
    return model


def _check_weights(chosen: dict[str, nn.Module]) -> None:
    for name, layer in chosen.items():
        for part, weight in weights_of(layer).items():
            if weight.is_meta:
                raise UserError(
                    f"quantize: the {part} of '{name}' is on the meta device (not loaded, or offloaded); load the "
                    "model whole first"
                )
            if weight.dtype not in _DTYPES:
                raise UserError(
                    f"quantize: '{name}' is {weight.dtype}; NF4 is made from float32, float16 or bfloat16, load the "
                    f"model with one of these dtypes or name the layer in skip"
                )
            if type(layer) in LINEAR and len(weight.shape) != 2:
                raise UserError(f"quantize: '{name}' has a weight of shape {tuple(weight.shape)}; name it in skip")
