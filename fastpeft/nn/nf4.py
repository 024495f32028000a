"""``NF4Linear``: a frozen linear layer whose weight is held in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.ops import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize


class NF4Linear(nn.Module):
    """``y = x W^T + bias`` with W in NF4; takes the place of a frozen ``nn.Linear``.

    Its ``state_dict`` has the keys and bytes of bitsandbytes' ``Linear4bit``. Scales stay float32 when the model is
    cast (``model.to(torch.bfloat16)``): a cast scale would silently change every weight.

    Args:
        nf4: the quantised ``(out_features, in_features)`` weight.
        bias: ``(out_features,)`` or None; frozen.
    Attributes:
        weight: the packed codes, ``(n * k / 2, 1)`` uint8, a parameter without gradient.
    Source:
        QLoRA, arXiv 2305.14314.
    """

    def __init__(self, nf4: NF4Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(nf4.shape) != 2:
            raise ValueError(f"NF4Linear: the weight has shape {nf4.shape}; it must be (out_features, in_features)")
        self.out_features, self.in_features = nf4.shape
        self.weight = nn.Parameter(nf4.codes, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._nf4 = nf4

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
        return self._nf4

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight: ``(out_features, in_features)``, in ``dtype`` or the one it was quantised from."""
        return nf4_dequantize(self._nf4, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: ``(..., in_features)`` to ``(..., out_features)``, dtype of ``x``."""
        return nf4_linear(x, self._nf4, self.bias)

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them."""
        scales = "double-quantised" if self._nf4.double_quant else "float32"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self._nf4.block_size}, scales={scales}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.weight.device
        if device != self._nf4.device:
            if device.type == "meta":
                raise ValueError(
                    "NF4Linear: a quantised weight cannot be moved to the meta device: its scales are data"
                )
            self._set(self._nf4.to(device))
        return self

    def _set(self, nf4: NF4Weight) -> None:
        self.weight = nn.Parameter(nf4.codes, requires_grad=False)
        self._nf4 = nf4

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stored = self._nf4.state_dict(prefix)
        del stored[prefix + "weight"]  # the parameter is there already
        destination.update(stored)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = [key for key in state_dict if key.startswith(prefix + "weight")]
        if own:
            try:
                loaded = NF4Weight.from_state_dict(state_dict, prefix)
            except ValueError as error:
                error_msgs.append(str(error))
            else:
                if loaded.shape == self._nf4.shape:
                    self._set(loaded.to(self.weight.device))
                else:
                    error_msgs.append(f"{prefix}weight has shape {loaded.shape}; this layer has {self._nf4.shape}")
        elif strict:
            missing_keys.append(prefix + "weight")
        rest = {key: value for key, value in state_dict.items() if key not in own}
        ignored: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, ignored, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in ignored if key != prefix + "weight")

    def __deepcopy__(self, memo: dict[int, Any]) -> NF4Linear:
        nf4 = self._nf4
        codes = nf4.codes.clone()
        copied = NF4Linear(
            NF4Weight(
                codes, nf4.absmax, nf4.nested_absmax, nf4.nested_map, nf4.offset, nf4.shape, nf4.block_size, nf4.dtype
            ),
            self.bias,
        )
        if self.bias is not None:
            copied.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        copied.train(self.training)
        memo[id(self)] = copied
        return copied
