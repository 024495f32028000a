"""LoRAExperts: a mixture's frozen experts with low-rank adapters beside their weights.

    y = x W[e]^T + s (x A[e]^T) B[e]^T,      s = alpha / r

for each token's row x and each of its experts e, in one or both products of the module (`fastpeft.nn.experts`); A[e] is
(r, k), B[e] (n, r). The base is dense or NF4; the adapters are fp32. Where PEFT (``target_parameters``) adds s B A to
the weights of all experts in every forward pass, here the rows of tokens go through A and B.

Files are PEFT's: A as (experts r, k), B as (n, r experts), the weight that comes first in the module innermost.

Trained: experts r (k + n) numbers a weight and adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.nn.adapted import Adapted
from fastpeft.nn.base_weight import with_parameters
from fastpeft.nn.experts import EXPERT_WEIGHTS, apply_experts, gate_of, is_experts
from fastpeft.nn.lora_init import plain_start
from fastpeft.nn.nf4_experts import NF4Experts
from fastpeft.ops.experts import Routing
from fastpeft.ops.linear_experts import linear_experts


class LoRAExperts(Adapted):
    """Frozen experts plus low-rank adapters.

    Args:
        base_layer: a module that `fastpeft.nn.experts.is_experts` knows, or `NF4Experts`; it is kept, not copied.
    Raises:
        UserError: the base is neither.
    Source:
        LoRA, arXiv 2106.09685.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if not self.can_adapt(base_layer):
            raise UserError(
                f"LoRAExperts: cannot adapt a {type(base_layer).__name__}; needs the experts of a mixture, with "
                f"{' and '.join(EXPERT_WEIGHTS)} (experts, n, k) and without biases"
            )
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.r: dict[str, dict[str, int]] = {}
        self.scaling: dict[str, dict[str, float]] = {}
        self.merged_adapters: list[str] = []
        for name in EXPERT_WEIGHTS:
            self.register_buffer(_merged(name), None, persistent=False)
        self.gate = base_layer.gate if isinstance(base_layer, NF4Experts) else gate_of(base_layer)
        self.base_layer.requires_grad_(False)
        self.train(base_layer.training)

    @staticmethod
    def can_adapt(module: nn.Module) -> bool:
        """Whether ``module`` is the experts of a mixture, dense or packed."""
        return isinstance(module, NF4Experts) or is_experts(module)

    def add_adapter(
        self,
        adapter_name: str,
        r: Mapping[str, int],
        lora_alpha: Mapping[str, float],
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Add an adapter; it becomes active only when ``active_adapters`` names it.

        Args:
            adapter_name: a new name.
            r: rank by the name of the weight, of those that are adapted.
            lora_alpha: numerator of the scale, likewise.
            use_rslora: scale by ``alpha / sqrt(r)``.
            init_lora_weights: True, False or "gaussian", as for linear layers, the experts drawn as one.
        """
        a_parts, b_parts = nn.ParameterDict(), nn.ParameterDict()
        for name in EXPERT_WEIGHTS:
            if name in r:
                experts, n, k = self._shape(name)
                a, b = plain_start(n, k, r[name], init_lora_weights, experts)
                a_parts[name] = nn.Parameter(_a_here(a.weight.detach(), experts))
                b_parts[name] = nn.Parameter(_b_here(b.weight.detach(), experts))
        device = next(self.base_layer.parameters()).device
        self.lora_A[adapter_name], self.lora_B[adapter_name] = a_parts.to(device), b_parts.to(device)
        self.r[adapter_name] = dict(r)
        self.scaling[adapter_name] = {
            name: lora_alpha[name] / (math.sqrt(rank) if use_rslora else rank) for name, rank in r.items()
        }

    # Values, for files.

    def held(self) -> list[str]:
        """Names of the adapters."""
        return list(self.lora_A)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; merged weights that contain it are unmerged first."""
        if adapter_name in self.lora_A:
            if adapter_name in self.merged_adapters:
                self.unmerge()
            del self.lora_A[adapter_name], self.lora_B[adapter_name], self.r[adapter_name], self.scaling[adapter_name]

    def parts(self, adapter_name: str) -> dict[str, str]:
        """A and B of each adapted weight."""
        names = [name for name in EXPERT_WEIGHTS if name in self.r[adapter_name]]
        inside = {name: "base_layer." * (len(names) - 1 - i) for i, name in enumerate(names)}
        return {
            f"lora_{part}.{adapter_name}.{name}": f"{inside[name]}lora_{part}.weight" for name in names for part in "AB"
        }

    def saved(self, adapter_name: str, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """A and B in PEFT's shapes."""
        return {
            tail: (_a_in_file if own.startswith("lora_A") else _b_in_file)(get(own))
            for own, tail in self.parts(adapter_name).items()
        }

    def load(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite values with saved ones."""
        here = {}
        for own, tail in self.parts(adapter_name).items():
            if tail in tensors:
                experts = self._at(own).shape[0]
                here[tail] = (_a_here if own.startswith("lora_A") else _b_here)(tensors[tail], experts)
        super().load(adapter_name, here)

    # Computing.

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply each token's experts and the active adapters.

        Args:
            hidden_states: ``(tokens, h)``.
            top_k_index: ``(tokens, k)``, int64: a token's experts.
            top_k_weights: ``(tokens, k)``, floating: their shares.
        Returns:
            ``(tokens, h)``, dtype of ``hidden_states``.
        """
        samples = None if self.routing is None else list(self.routes(hidden_states.shape[0], hidden_states.device))

        def product(name: str, x: Tensor, routing: Routing) -> Tensor:
            merged = getattr(self, _merged(name))
            if merged is not None and not self.adapters_disabled and samples is None:
                return linear_experts(x, merged, routing.ends)
            y = self._base_product(name, x, routing)
            for adapter in self.working() if samples is None else ():
                y = self._add(y, adapter, name, x, routing.ends)
            for adapter, tokens in samples or ():
                rows = routing.place[tokens].flatten().sort().values.long()  # in their order, so sorted by expert
                ends = torch.searchsorted(rows, routing.ends.long(), out_int32=True)
                y = y.index_copy(0, rows, self._add(y[rows], adapter, name, x[rows], ends))
            return y

        return apply_experts(hidden_states, top_k_index, top_k_weights, self.num_experts, product, self.gate)

    def _base_product(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        if isinstance(self.base_layer, NF4Experts):
            return self.base_layer.product(name, x, routing)
        return linear_experts(x, self.base_layer.get_parameter(name), routing.ends)

    def _add(self, y: Tensor, adapter_name: str, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """Add to the base's output, in place, what an adapter adds to it."""
        if name not in self.r[adapter_name]:
            return y
        a, b = self.factors(adapter_name, name)
        return y.add_(linear_experts(linear_experts(x, a, ends), self.scaling[adapter_name][name] * b, ends))

    def factors(self, adapter_name: str, name: str) -> tuple[Tensor, Tensor]:
        """A ``(experts, r, k)`` and B ``(experts, n, r)`` beside one weight."""
        a, b = (self._at(f"lora_{part}.{adapter_name}.{name}") for part in "AB")
        return a, b

    # Merging.

    @torch.no_grad()
    def merged_dense_weights(self, adapter_names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Compute the weights with adapters folded in, expert by expert in fp32 and rounded; nothing is changed.

        Args:
            adapter_names: adapters to fold in; None for the active ones. Names this module lacks do nothing.
        Returns:
            By name, in the dtype of the dense base or of the weight that the NF4 base was made from.
        """
        names = [n for n in (self.active_adapters if adapter_names is None else adapter_names) if n in self.held()]
        packed = isinstance(self.base_layer, NF4Experts)
        dense = self.base_layer.to_dense() if packed else self.base_layer  # type: ignore[operator]
        weights = {}
        for name in EXPERT_WEIGHTS:
            base = dense.get_parameter(name).detach()
            weights[name] = weight = base if packed else base.clone()
            for each in names:
                if name in self.r[each]:
                    a, b = self.factors(each, name)
                    for expert, own in enumerate(weight):
                        sums = own.to(torch.promote_types(own.dtype, a.dtype))
                        own.copy_(torch.addmm(sums, b[expert], a[expert], alpha=self.scaling[each][name]))
        return weights

    def holds_any(self, names: Sequence[str]) -> bool:
        """Whether one of the names acts here."""
        return bool(set(names) & set(self.held()))

    @property
    def merged_weight(self) -> Tensor | None:
        """A weight with adapters in it, where they are merged."""
        merged: Tensor | None = getattr(self, _merged(EXPERT_WEIGHTS[0]))
        return merged

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Use dense weights with the adapters folded in until ``unmerge``; the base stays as it is.

        Args:
            safe_merge: refuse merged weights that hold NaN or Inf.
            adapter_names: adapters to merge; None for the active ones.
        Raises:
            UserError: ``safe_merge`` found a NaN or Inf.
        """
        names = [n for n in (self.active_adapters if adapter_names is None else adapter_names) if n in self.held()]
        if not names:
            return
        weights = self.merged_dense_weights(names)
        if safe_merge and not all(bool(weight.isfinite().all()) for weight in weights.values()):
            raise UserError(f"LoRAExperts.merge: a weight merged with {names} holds NaN or Inf")
        for name, weight in weights.items():
            setattr(self, _merged(name), weight)
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Drop the merged weights, exactly."""
        for name in EXPERT_WEIGHTS:
            setattr(self, _merged(name), None)
        self.merged_adapters = []

    def to_dense(self, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """Frozen dense experts of the base's class with the adapters merged."""
        weights = self.merged_dense_weights(adapter_names)
        if isinstance(self.base_layer, NF4Experts):
            return self.base_layer.dense_with(**weights)
        return with_parameters(self.base_layer, **weights).train(self.training)

    def innermost(self) -> nn.Module:
        """The experts themselves."""
        return self.base_layer

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self._shape(EXPERT_WEIGHTS[0])[0]

    def _shape(self, name: str) -> tuple[int, ...]:
        """``(experts, n, k)`` of one weight."""
        if isinstance(self.base_layer, NF4Experts):
            return self.base_layer.packed[name].shape
        return tuple(self.base_layer.get_parameter(name).shape)

    def extra_repr(self) -> str:
        """Ranks and scales by adapter, shown in ``print(model)``."""
        return f"r={self.r}, scaling={self.scaling}, active={self.active_adapters}"


def has_experts(module: nn.Module) -> bool:
    """Whether a module is the experts of a mixture, with adapters or without."""
    return isinstance(module, LoRAExperts) or LoRAExperts.can_adapt(module)


def _merged(name: str) -> str:
    return f"merged_{name}"


# A (experts, r, k) and B (experts, n, r), and as PEFT's files have them.


def _a_here(a: Tensor, experts: int) -> Tensor:
    return a.reshape(experts, -1, a.shape[1]).contiguous()


def _b_here(b: Tensor, experts: int) -> Tensor:
    return b.reshape(b.shape[0], -1, experts).permute(2, 0, 1).contiguous()


def _a_in_file(a: Tensor) -> Tensor:
    return a.reshape(-1, a.shape[2])


def _b_in_file(b: Tensor) -> Tensor:
    return b.permute(1, 2, 0).reshape(b.shape[1], -1)
