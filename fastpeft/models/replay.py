"""Linear layers as products, whatever modules hold them: together where they share an input, run once and
differentiated later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastpeft.nn import LoRALinear, NF4Linear
from fastpeft.ops import NF4Weight, lora_few, lora_linear_group, nf4_linear_add_
from fastpeft.ops.dropout import new_seed
from fastpeft.ops.nf4 import base_product
from fastpeft.ops.replay import base_node, lora_node, lora_product, unread


@dataclass(frozen=True)
class Seen:
    """What is kept of products of one input between forward and backward.

    Attributes:
        ys: the outputs, where they are kept.
        xa: the low-rank paths' input product, where the outputs are kept or are read by nobody.
        seed: of the dropout mask.
        is_read: whether backward needs the outputs' values.
    """

    ys: list[Tensor] | None
    xa: Tensor | None
    seed: Tensor | None
    is_read: bool


class Adapter(NamedTuple):
    """A low-rank term: ``scale * (drop(x) a^T) b^T``."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float


@dataclass(frozen=True)
class Product:
    """``x w^T + bias``, plus a low-rank term where there is an adapter.

    Attributes:
        weight: ``(n, k)``, dense or NF4.
        bias: ``(n,)`` or None.
        adapter: the low-rank term or None.
    """

    weight: Tensor | NF4Weight
    bias: Tensor | None
    adapter: Adapter | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What of it is trained."""
        factors = self.adapter[:2] if self.adapter else ()
        base = () if isinstance(self.weight, NF4Weight) else (self.weight,)
        return tuple(p for p in (*base, self.bias, *factors) if p is not None and p.requires_grad)


def sharing(products: Sequence[Product | None]) -> list[Product] | None:
    """The products, if as several of one input they can be computed together: all have an adapter, of equal dropout."""
    known = [product for product in products if product is not None and product.adapter is not None]
    dropouts = {product.adapter.dropout for product in known if product.adapter is not None}
    return known if len(known) == len(products) > 1 and len(dropouts) == 1 else None


def quantized(products: Sequence[Product | None]) -> list[NF4Weight] | None:
    """The weights, if all are NF4 with neither bias nor adapter."""
    weights = [
        product.weight
        for product in products
        if product is not None and product.bias is None and product.adapter is None
    ]
    found = [weight for weight in weights if isinstance(weight, NF4Weight)]
    return found if len(found) == len(products) else None


def together(products: Sequence[Product], x: Tensor) -> list[Tensor]:
    """Apply products that `sharing` gave, in the graph of their input."""
    lists, dropout = _of_each(products)
    return lora_linear_group(x, *lists, dropout)


def add_product(total: Tensor, x: Tensor, product: Product | None) -> Tensor | None:
    """Add a product to what a tensor of the same dtype holds, in place; None where no kernel does, untouched then.

    Nothing is differentiated.
    """
    if product is None or not isinstance(product.weight, NF4Weight) or product.bias is not None:
        return None
    adapter = product.adapter
    if adapter is None:
        return nf4_linear_add_(total, x, product.weight)
    if adapter.dropout == 0.0 and lora_few.takes(x, [adapter.a], [adapter.b], []):
        return lora_few.few_add_(total, x, product.weight, adapter.a, adapter.b, adapter.scale)
    return None


def run(products: Sequence[Product], x: Tensor, keep: bool, is_read: bool) -> tuple[list[Tensor], Seen]:
    """Compute the outputs outside of autograd.

    Args:
        products: one, or some that `sharing` gave.
        x: the input.
        keep: keep the outputs for backward.
        is_read: whether backward needs the outputs' values.
    Returns:
        The outputs and what `replay` needs.
    """
    adapter = products[0].adapter
    seed = new_seed() if adapter and adapter.dropout > 0 else None
    ys, xa = _compute(products, x, seed)
    return ys, Seen(ys if keep else None, xa if keep or not is_read else None, seed, is_read)


def replay(products: Sequence[Product], x: Tensor, seen: Seen) -> list[Tensor]:
    """Give the outputs again, in the graph of their input; they are computed only if they are read and were not kept.

    Args:
        products: as in `run`.
        x: the same input, in the graph.
        seen: what `run` gave.
    """
    ys, xa = seen.ys, seen.xa
    if ys is None and seen.is_read:
        ys, xa = _compute(products, x, seen.seed)
    elif ys is None:
        ys = [unread(x, product.weight.shape[0]) for product in products]
    if products[0].adapter is None:
        return [base_node(x, y, product.weight, product.bias) for product, y in zip(products, ys, strict=True)]
    assert xa is not None
    lists, dropout = _of_each(products)
    return lora_node(x, ys, xa, *lists, dropout, seen.seed)


@torch.no_grad()
def _compute(products: Sequence[Product], x: Tensor, seed: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    if products[0].adapter is None:
        return [base_product(x, product.weight, product.bias) for product in products], None
    lists, dropout = _of_each(products)
    return lora_product(x, *lists, dropout, seed)


_Lists = tuple[list[Tensor | NF4Weight], tuple[Tensor, ...], tuple[Tensor, ...], tuple[float, ...], list[Tensor | None]]


def _of_each(products: Sequence[Product]) -> tuple[_Lists, float]:
    """Weights, a, b, scales and biases, and the dropout that all have."""
    adapters = [product.adapter for product in products if product.adapter is not None]
    a, b, scales, dropouts = zip(*adapters, strict=True)
    return ([product.weight for product in products], a, b, scales, [product.bias for product in products]), dropouts[0]


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
        active = module.working()
        if module.routing is not None or len(active) > 1 or not all(module.is_product(name) for name in active):
            return None
        base = product_of(module.base_layer)
        if base is None or not active:
            return base
        (name,) = active
        dropout = module.lora_dropout[name] if module.training else 0.0
        a, b = (cast(Tensor, factors[name].weight) for factors in (module.lora_A, module.lora_B))
        return Product(base.weight, base.bias, Adapter(a, b, module.scaling[name], dropout))
    if type(module) is NF4Linear:
        return Product(module.nf4, module.bias, None)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return Product(module.weight, module.bias, None)
    return None
