"""AdaptedLinear: a frozen linear layer with adapters of one kind around it, and merging.

Merging never touches the base: the merged weight is a buffer of its own (not in the state dict), which the forward
pass uses while it is there. Unmerging is therefore exact in every dtype, an NF4 base merges too, and a weight shared
with the embedding stays as it is. The price is one dense copy of the weight while merged.

Kinds nest: the base of one may be the other (an (IA)^3 layer holds a LoRA layer), and merging takes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.nn.adapted import Adapted
from fastpeft.nn.base_weight import dense_weight, is_linear, plain_layer, sizes


class AdaptedLinear(Adapted):
    """A linear layer with adapters by name.

    Args:
        base_layer: ``nn.Linear``, ``NF4Linear``, ``Conv1D``, or another AdaptedLinear; it is kept, not copied.
    Raises:
        UserError: the base is none of these.
    """

    merged_weight: Tensor | None
    merged_bias: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if not self.can_adapt(base_layer):
            raise UserError(
                f"{type(self).__name__}: cannot adapt a {type(base_layer).__name__}; needs torch.nn.Linear or Conv1D "
                "with a floating-point weight, or fastpeft.NF4Linear"
            )
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)
        self.base_layer.requires_grad_(False)
        self.train(base_layer.training)

    @staticmethod
    def can_adapt(module: nn.Module) -> bool:
        """Whether ``module`` is a linear layer whose whole forward pass is ``x @ weight.T + bias``."""
        return is_linear(module)

    def merged(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """Weight ``(n, k)`` in fp32 with adapters folded in, the bias, and the dtype that the weight stands for."""
        raise NotImplementedError

    def _inner(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """The same of the base."""
        if isinstance(self.base_layer, AdaptedLinear):
            return self.base_layer.merged(names)
        weight, dtype = dense_weight(self.base_layer)
        return weight, self.bias, dtype

    def holds_any(self, names: Sequence[str]) -> bool:
        """Whether one of the names acts on this layer, or on the one it holds."""
        return bool(set(names) & set(self.held())) or (
            isinstance(self.base_layer, AdaptedLinear) and self.base_layer.holds_any(names)
        )

    def merged_dense_weight(self, adapter_names: Sequence[str] | None = None) -> Tensor:
        """Compute the weight with adapters folded in, in fp32, and round it once; nothing is changed.

        Args:
            adapter_names: adapters to fold in; None for the active ones. Names this layer lacks do nothing.
        Returns:
            ``(n, k)``, dtype of the dense base or of the weight that the NF4 base was made from.
        """
        weight, _, dtype = self.merged(self.active_adapters if adapter_names is None else adapter_names)
        return weight.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Use one dense weight with the adapters folded in until ``unmerge``; the base layer stays as it is.

        Args:
            safe_merge: refuse a merged weight that holds NaN or Inf.
            adapter_names: adapters to merge; None for the active ones.
        Raises:
            UserError: ``safe_merge`` found a NaN or Inf.
        """
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        if not self.holds_any(names):
            return
        weight, bias, dtype = self.merged(names)
        weight = weight.to(dtype)
        if safe_merge and not weight.isfinite().all():
            raise UserError(
                f"{type(self).__name__}.merge: the weight merged with {names} holds NaN or Inf; the adapter is broken "
                f"or overflows {dtype}"
            )
        self.merged_weight = weight
        self.merged_bias = None if bias is None else bias.detach()
        self.merged_adapters = [name for name in names if self.holds_any([name])]

    def unmerge(self) -> None:
        """Drop the merged weight and go back to base and adapters, exactly."""
        self.merged_weight = self.merged_bias = None
        self.merged_adapters = []

    def to_dense(self, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """Make a plain layer that computes what this one does with the adapters merged.

        Args:
            adapter_names: adapters to merge; None for the active ones.
        Returns:
            A frozen ``nn.Linear`` (``Conv1D`` over one) with a weight of its own and the base's bias.
        """
        weight, bias, dtype = self.merged(self.active_adapters if adapter_names is None else adapter_names)
        return plain_layer(self.innermost(), weight.to(dtype), bias)

    def innermost(self) -> nn.Module:
        """The base without any adapter around it."""
        return self.base_layer.innermost() if isinstance(self.base_layer, AdaptedLinear) else self.base_layer

    def _merged_forward(self, x: Tensor) -> Tensor | None:
        """The output by the merged weight, where there is one and it is to be used."""
        if self.merged_weight is None or self.adapters_disabled or self.routing is not None:
            return None
        return F.linear(x, self.merged_weight, self.merged_bias)

    # What model code reads from a linear layer.

    @property
    def in_features(self) -> int:
        """Input features k of the base."""
        return sizes(self.innermost())[1]

    @property
    def out_features(self) -> int:
        """Output features n of the base."""
        return sizes(self.innermost())[0]

    @property
    def weight(self) -> Tensor:
        """The base's stored weight: dense, or the packed codes of an NF4 base."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        return cast("nn.Parameter | None", self.base_layer.bias)
