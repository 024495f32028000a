"""The weight of a linear layer, whatever holds it: dense ``(n, k)``, transposed ``(k, n)``, or NF4."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft.nn.nf4 import NF4Linear
from fastpeft.ops import NF4Weight, nf4_dequantize


def is_linear(module: nn.Module) -> bool:
    """Whether a module's whole forward pass is ``x @ weight.T + bias``.

    Subclasses of ``nn.Linear`` that compute something else (packed or quantised weights of other libraries) and the
    output projection inside ``nn.MultiheadAttention``, which is read but never called, do not qualify.
    """
    if isinstance(module, NF4Linear):
        return True
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    for kind in (nn.Linear, Conv1D):
        if isinstance(module, kind):
            return type(module).forward is kind.forward and module.weight.is_floating_point()
    return False


def is_transposed(module: nn.Module) -> bool:
    """Whether the stored weight is ``(k, n)``, as in GPT-2's Conv1D."""
    return isinstance(module, Conv1D)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Output and input features ``(n, k)`` of a linear layer."""
    if isinstance(module, Conv1D):
        k, n = module.weight.shape
        return n, k
    return module.out_features, module.in_features  # type: ignore[return-value]


def operand(module: nn.Module) -> Tensor | NF4Weight:
    """What `fastpeft.ops.lora_linear` takes as the weight ``(n, k)``; nothing is copied."""
    if isinstance(module, NF4Linear):
        return module.nf4
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if is_transposed(module) else weight


@torch.no_grad()
def dense_weight(module: nn.Module) -> tuple[Tensor, torch.dtype]:
    """A copy of the weight ``(n, k)`` in fp32 (or fp64), and the dtype that it stands for."""
    weight = operand(module)
    if isinstance(weight, NF4Weight):
        return nf4_dequantize(weight, torch.float32), weight.dtype
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True), weight.dtype


def plain_layer(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A frozen layer of the module's kind (dense for NF4) over another weight.

    Args:
        module: the layer whose place it takes.
        weight: ``(n, k)``.
        bias: ``(n,)`` or None; a parameter is kept as it is.
    """
    if bias is not None and not isinstance(bias, nn.Parameter):
        bias = nn.Parameter(bias, requires_grad=False)
    layer: nn.Module
    if is_transposed(module):
        layer = with_parameters(module, weight=weight.t().contiguous(), bias=bias)
    else:
        n, k = weight.shape
        layer = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_parameter("bias", bias)
    return layer.train(module.training)


def with_parameters(module: nn.Module, **values: Tensor | None) -> nn.Module:
    """A module of the same class and settings with other, frozen parameters."""
    copied = copy.copy(module)
    copied.__dict__["_parameters"] = dict(module._parameters)
    for name, value in values.items():
        frozen = value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        copied._parameters[name] = frozen
    return copied
