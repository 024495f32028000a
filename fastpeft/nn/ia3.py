"""IA3Linear: a frozen linear layer whose output, or input, is scaled by trained vectors.

    y[m,n] = (x @ w[n,k]^T + bias) * l[n]          or, as a feed-forward layer,         y = (x * l[k]) @ w^T + bias

Several active adapters multiply. A layer trains n numbers (feed-forward: k), fp32, and keeps its base's output (input)
for their gradient. Names are PEFT's: ``base_layer``, ``ia3_l.<name>`` of shape ``(n, 1)`` or ``(1, k)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastpeft.nn.adapted_linear import AdaptedLinear


class IA3Linear(AdaptedLinear):
    """A frozen linear layer with (IA)^3 vectors.

    Args:
        base_layer: the layer to adapt; a LoRALinear too.
        is_feedforward: scale the input instead of the output.
    Source:
        (IA)^3, arXiv 2205.05638.
    """

    def __init__(self, base_layer: nn.Module, is_feedforward: bool = False) -> None:
        super().__init__(base_layer)
        self.is_feedforward = is_feedforward
        self.ia3_l = nn.ParameterDict()

    @staticmethod
    def can_adapt(module: nn.Module) -> bool:
        """Whether ``module`` is a linear layer, or one with adapters of another kind."""
        return isinstance(module, AdaptedLinear) or AdaptedLinear.can_adapt(module)

    def add_adapter(self, adapter_name: str, init_ia3_weights: bool = True) -> None:
        """Add a vector; it acts only once ``active_adapters`` names it.

        Args:
            adapter_name: a new name.
            init_ia3_weights: begin with ones, which change nothing; False draws from a normal distribution.
        """
        shape = (1, self.in_features) if self.is_feedforward else (self.out_features, 1)
        vector = torch.randn(shape)  # drawn in either case, as PEFT does, so that one seed gives equal starts
        if init_ia3_weights:
            vector.fill_(1)
        self.ia3_l[adapter_name] = nn.Parameter(vector.to(self.weight.device))

    def held(self) -> list[str]:
        """Names of the vectors."""
        return list(self.ia3_l.keys())

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a vector; merged weights that contain it are unmerged first."""
        if adapter_name in self.ia3_l:
            if adapter_name in self.merged_adapters:
                self.unmerge()
            del self.ia3_l[adapter_name]

    def parts(self, adapter_name: str) -> dict[str, str]:
        """The one vector."""
        return {f"ia3_l.{adapter_name}": "ia3_l"}

    def forward(self, x: Tensor) -> Tensor:
        """Apply base and vectors: ``(..., k)`` to ``(..., n)``, dtype of the base's output."""
        merged = self._merged_forward(x)
        if merged is not None:
            return merged
        if self.is_feedforward:
            out: Tensor = self.base_layer(self._scaled(x))
            return out
        return self._scaled(self.base_layer(x))

    def _scaled(self, x: Tensor) -> Tensor:
        if self.routing is not None:
            scale = None
            for name, rows in self.routes(x.shape[0], x.device):
                vector = self.ia3_l[name].flatten()
                if scale is None:
                    scale = vector.new_ones(x.shape[0], vector.numel())
                scale = scale.index_copy(0, rows, vector.expand(len(rows), -1))
            if scale is None:
                return x
            routed: Tensor = x * scale.view(x.shape[0], *(1,) * (x.dim() - 2), -1)
            return routed.to(x.dtype)
        names = self.working()
        if not names:
            return x
        scale = self.ia3_l[names[0]].flatten()
        for name in names[1:]:
            scale = scale * self.ia3_l[name].flatten()
        scaled: Tensor = x * scale
        return scaled.to(x.dtype)

    @torch.no_grad()
    def merged(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """``diag(l) w`` and ``l * bias``, or ``w diag(l)``."""
        weight, bias, dtype = self._inner(names)
        for name in names:
            if name in self.ia3_l:
                vector = self.ia3_l[name].to(weight.dtype)
                weight.mul_(vector)
                if bias is not None and not self.is_feedforward:
                    bias = (bias * vector.flatten()).to(bias.dtype)
        return weight, bias, dtype

    def extra_repr(self) -> str:
        """Names, shown in ``print(model)``."""
        place = "input" if self.is_feedforward else "output"
        return f"adapters={self.held()}, active={self.active_adapters}, scales its {place}"
