"""Bottleneck adapters: small networks after, or beside, the attention and the MLP of a layer.

    h + c * up(act(down(norm(h))))        sequential: h is the sublayer's output, before it joins the residual stream
    h + c * up(act(down(norm(x))))        parallel: x is the sublayer's input

``down`` is ``(b, d)`` and ``up`` ``(d, b)``, fp32 with biases: 2 b d + b + d trained numbers a site, 2 d more for each
LayerNorm and 1 for a learned c. Modules are named as AdapterHub names them (``adapter_down.0``, ``adapter_up``,
``adapter_norm_before``, ``adapter_norm_after``), and lie in the layer as ``attention_adapters``, ``output_adapters``.

A site acts through a forward hook on its sublayer, so that whatever else is done to that sublayer, by us or by others,
goes on as it was, and sublayers of any kind (a mixture of experts too) can have one.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.nn.adapted import Adapted, on_rows

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "leakyrelu": nn.LeakyReLU,
}


class BottleneckAdapter(nn.Module):
    """Down-projection, activation, up-projection.

    Args:
        width: d, features of the sublayer.
        bottleneck: b.
        activation: a key of `ACTIVATIONS`.
        norm_before: LayerNorm on the input.
        norm_after: LayerNorm on the output, before it is added.
        dropout: of the output, in training.
        scaling: c; "learned" trains it, from 1.
        init: "zero" (up zero: the model begins as its base), "xavier" (the same, down by Xavier) or "bert" (both normal
            with standard deviation 0.02).
    Source:
        Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247; He et al., arXiv 2110.04366.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        activation: str = "relu",
        norm_before: bool = False,
        norm_after: bool = False,
        dropout: float = 0.0,
        scaling: float | str = 1.0,
        init: str = "zero",
    ) -> None:
        super().__init__()
        down, up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        if init == "bert":
            nn.init.normal_(down.weight, std=0.02)
            nn.init.normal_(up.weight, std=0.02)
        else:
            if init == "xavier":
                nn.init.xavier_uniform_(down.weight)
            else:
                nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        self.adapter_norm_before = nn.LayerNorm(width) if norm_before else None
        self.adapter_down = nn.Sequential(down, ACTIVATIONS[activation]())
        self.adapter_up = up
        self.adapter_norm_after = nn.LayerNorm(width) if norm_after else None
        self.dropout = dropout
        self.scaling: float | nn.Parameter = nn.Parameter(torch.ones(1)) if scaling == "learned" else float(scaling)

    def forward(self, x: Tensor) -> Tensor:
        """What the adapter adds, ``(..., d)``, dtype of ``x``; the fp32 weights are cast to it."""
        y = x if self.adapter_norm_before is None else _norm(self.adapter_norm_before, x)
        down, act = self.adapter_down
        y = _linear(self.adapter_up, act(_linear(cast(nn.Linear, down), y)))
        y = F.dropout(y * self.scaling, self.dropout, self.training).to(x.dtype)
        return y if self.adapter_norm_after is None else _norm(self.adapter_norm_after, y)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    y: Tensor = norm(x.to(norm.weight.dtype))
    return y.to(x.dtype)


class BottleneckSite(Adapted):
    """The adapters of one sublayer, by name; those of several active ones add up.

    Args:
        sublayer: the module whose output they change. It is not kept as a part: the layer holds both.
    """

    def __init__(self, sublayer: nn.Module) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.is_parallel: dict[str, bool] = {}
        self._hook_id = sublayer.register_forward_hook(self._after, with_kwargs=True).id
        self.train(sublayer.training)

    def leave(self, sublayer: nn.Module) -> None:
        """Let go of the sublayer."""
        sublayer._forward_hooks.pop(self._hook_id, None)
        sublayer._forward_hooks_with_kwargs.pop(self._hook_id, None)

    def add_adapter(self, adapter_name: str, adapter: BottleneckAdapter, is_parallel: bool) -> None:
        """Add an adapter; it acts only once ``active_adapters`` names it."""
        self.adapters[adapter_name] = adapter
        self.is_parallel[adapter_name] = is_parallel

    def held(self) -> list[str]:
        """Names of the adapters."""
        return list(self.adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; names without one here are ignored."""
        if adapter_name in self.adapters:
            del self.adapters[adapter_name], self.is_parallel[adapter_name]

    def set_dropout(self, p: float) -> None:
        """Give all adapters of this site another dropout."""
        for adapter in self.adapters.values():
            cast(BottleneckAdapter, adapter).dropout = p

    def parts(self, adapter_name: str) -> dict[str, str]:
        """All tensors of the adapter, the name in their key as AdapterHub has it."""
        names = [f"adapters.{adapter_name}.{name}" for name, _ in self.adapters[adapter_name].named_parameters()]
        return {name: name for name in names}

    def _after(self, sublayer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook."""
        names = self.working()
        if not names and self.routing is None:
            return output
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        h: Tensor = output[0] if isinstance(output, tuple) else output
        if self.routing is not None:
            changed = on_rows(h, x, self.routes(h.shape[0], h.device), self._share)
        else:
            changed = h
            for name in names:
                changed = changed + self._share(name, x, h)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _share(self, adapter_name: str, x: Tensor, h: Tensor) -> Tensor:
        share: Tensor = self.adapters[adapter_name](x if self.is_parallel[adapter_name] else h)
        return share

    def extra_repr(self) -> str:
        """Names, shown in ``print(model)``."""
        return f"adapters={self.held()}, active={self.active_adapters}"
