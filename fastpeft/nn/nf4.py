"""``NF4Linear``: a frozen linear layer whose weight is held in 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft.nn.nf4_module import NF4Module
from fastpeft.ops import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize


class NF4Linear(NF4Module):
    """``y = x W^T + bias`` with W in NF4; takes the place of a frozen ``nn.Linear``.

    Its ``state_dict`` has the keys and bytes of bitsandbytes' ``Linear4bit``.

    Args:
        nf4: the quantised ``(out_features, in_features)`` weight.
        bias: ``(out_features,)`` or None; frozen.
    Attributes:
        weight: the packed codes, ``(n * k / 2, 1)`` uint8, a parameter without gradient.
    Source:
        QLoRA, arXiv 2305.14314.
    """

    def __init__(self, nf4: NF4Weight, bias: Tensor | None = None) -> None:
        if len(nf4.shape) != 2:
            raise ValueError(f"NF4Linear: the weight has shape {nf4.shape}; it must be (out_features, in_features)")
        super().__init__(weight=nf4)
        self.out_features, self.in_features = nf4.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int = 64, double_quant: bool = True) -> NF4Linear:
        """Quantise a dense layer; the layer itself is left as it is.

        Args:
            linear: the layer; float32, float16 or bfloat16.
            block_size: weights a scale covers, 32 to 4096.
            double_quant: quantise the scales too.
        """
        return cls(nf4_quantize(linear.weight, block_size, double_quant), linear.bias)

    @property
    def nf4(self) -> NF4Weight:
        """The quantised weight."""
        return self._packed["weight"]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight: ``(out_features, in_features)``, in ``dtype`` or the one it was quantised from."""
        return nf4_dequantize(self.nf4, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: ``(..., in_features)`` to ``(..., out_features)``, dtype of ``x``."""
        return nf4_linear(x, self.nf4, self.bias)

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them."""
        scales = "double-quantised" if self.nf4.double_quant else "float32"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.nf4.block_size}, scales={scales}"
        )
