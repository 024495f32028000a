"""A linear layer as a product that can be run once and differentiated later, whatever module holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastpeft.nn import LoRALinear, NF4Linear
from fastpeft.ops import NF4Weight
from fastpeft.ops.dropout import new_seed
from fastpeft.ops.replay import base_node, base_product, lora_node, lora_product, unread


@dataclass(frozen=True)
class Seen:
    """What is kept of a product between forward and backward.

    Attributes:
        y: the output, where it is kept.
        xa: the low-rank path's input product, where the output is kept or is read by nobody.
        seed: of the dropout mask.
        is_read: whether backward needs the output's values.
    """

    y: Tensor | None
    xa: Tensor | None
    seed: Tensor | None
    is_read: bool


@dataclass(frozen=True)
class Product:
    """``x w^T + bias``, plus a low-rank term where there is an adapter.

    Attributes:
        weight: ``(n, k)``, dense or NF4.
        bias: ``(n,)`` or None.
        adapter: ``a``, ``b``, scale and dropout, or None.
    """

    weight: Tensor | NF4Weight
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor, float, float] | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What of it is trained."""
        factors = self.adapter[:2] if self.adapter else ()
        base = () if isinstance(self.weight, NF4Weight) else (self.weight,)
        return tuple(p for p in (*base, self.bias, *factors) if p is not None and p.requires_grad)

    def run(self, x: Tensor, keep: bool, is_read: bool) -> tuple[Tensor, Seen]:
        """Compute the output outside of autograd.

        Args:
            x: the input.
            keep: keep the output for backward.
            is_read: whether backward needs the output's values.
        Returns:
            The output and what `replay` needs.
        """
        seed = new_seed() if self.adapter and self.adapter[3] > 0 else None
        y, xa = self._compute(x, seed)
        return y, Seen(y if keep else None, xa if keep or not is_read else None, seed, is_read)

    def replay(self, x: Tensor, seen: Seen) -> Tensor:
        """Give the output again, in the graph of its input; it is computed only if it is read and was not kept."""
        y, xa = seen.y, seen.xa
        if y is None and seen.is_read:
            y, xa = self._compute(x, seen.seed)
        elif y is None:
            y = unread(x, self.weight.shape[0])
        if self.adapter is None:
            return base_node(x, y, self.weight, self.bias)
        a, b, scale, dropout = self.adapter
        assert xa is not None
        return lora_node(x, y, xa, self.weight, a, b, scale, self.bias, dropout, seen.seed)

    @torch.no_grad()
    def _compute(self, x: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.adapter is None:
            return base_product(x, self.weight, self.bias), None
        a, b, scale, dropout = self.adapter
        return lora_product(x, self.weight, a, b, scale, self.bias, dropout, seed)


def product_of(module: Any) -> Product | None:
    """The product that a linear layer computes now; None where it is more than one, or another library's.

    Args:
        module: a module that stands where a linear layer was.
    """
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return None
    if type(module) is LoRALinear:
        if module.merged_weight is not None and not module.adapters_disabled:
            return None
        active = [] if module.adapters_disabled else [n for n in module.active_adapters if n in module.lora_A]
        if len(active) > 1:
            return None
        base = product_of(module.base_layer)
        if base is None or not active:
            return base
        (name,) = active
        dropout = module.lora_dropout[name] if module.training else 0.0
        a, b = (cast(Tensor, factors[name].weight) for factors in (module.lora_A, module.lora_B))
        return Product(base.weight, base.bias, (a, b, module.scaling[name], dropout))
    if type(module) is NF4Linear:
        return Product(module.nf4, module.bias, None)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return Product(module.weight, module.bias, None)
    return None
