"""LoRALinear: a frozen linear layer with trainable low-rank adapters beside it.

    y[m,n] = x[m,k] @ w[n,k]^T + bias + s * dropout(x)[m,k] @ A[r,k]^T @ B[n,r]^T,      s = alpha / r

The base (dense or NF4) and its first active adapter go through one fused op; the adapters are fp32 master weights
whatever the base's dtype. A layer holds any number of adapters by name; several may be active at once, and their
low-rank terms add up. Submodules are named as PEFT names them (``base_layer``, ``lora_A.<name>``, ``lora_B.<name>``),
so that parameter names and files agree.

Merging never touches the base: the merged weight is a buffer of its own (not in the state dict), which the forward
pass uses while it is there. Unmerging is therefore exact in every dtype, an NF4 base merges too, and a weight shared
with the embedding stays as it is. The price is one dense copy of the weight while merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.nn.nf4 import NF4Linear
from fastpeft.ops import NF4Weight, lora_linear, nf4_dequantize


class LoRALinear(nn.Module):
    """A frozen linear layer plus low-rank adapters.

    Args:
        base_layer: the layer to adapt, ``nn.Linear`` or ``NF4Linear`` of weight ``(n, k)``; it is kept, not copied.
        adapter_name: name of the first adapter.
        r: its rank.
        lora_alpha: numerator of its scale.
        lora_dropout: probability of dropping an input element of the low-rank path, in training.
        use_rslora: scale by ``alpha / sqrt(r)`` instead of ``alpha / r``.
        init_lora_weights: True (A uniform as in ``nn.Linear``, B zero), "gaussian" (A normal with standard deviation
            1 / r, B zero) or False (A and B both as in ``nn.Linear``, so the layer's output changes at once).
    Raises:
        UserError: the base is not a linear layer that can be adapted, or a number is out of range.
    Source:
        LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732.
    """

    merged_weight: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        super().__init__()
        if not self.can_adapt(base_layer):
            raise UserError(
                f"LoRALinear: cannot adapt a {type(base_layer).__name__}; needs torch.nn.Linear with a floating-point "
                "weight, or fastpeft.NF4Linear"
            )
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.active_adapters: list[str] = [adapter_name]
        self.merged_adapters: list[str] = []
        self.adapters_disabled = False
        self.register_buffer("merged_weight", None, persistent=False)
        self.base_layer.requires_grad_(False)
        self.train(base_layer.training)
        self.add_adapter(adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)

    @staticmethod
    def can_adapt(module: nn.Module) -> bool:
        """Whether ``module`` is a linear layer whose whole forward pass is ``x @ weight.T + bias``.

        Subclasses of ``nn.Linear`` that compute something else (packed or quantised weights of other libraries) and
        the output projection inside ``nn.MultiheadAttention``, which is read but never called, do not qualify.
        """
        if isinstance(module, NF4Linear):
            return True
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return False
        return (
            isinstance(module, nn.Linear)
            and type(module).forward is nn.Linear.forward
            and module.weight.is_floating_point()
        )

    def add_adapter(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Add an adapter; it becomes active only when ``active_adapters`` names it.

        Args:
            adapter_name: a new name.
            r: rank.
            lora_alpha: numerator of the scale.
            lora_dropout: probability of dropping an input element, in training.
            use_rslora: scale by ``alpha / sqrt(r)``.
            init_lora_weights: as in the constructor.
        Raises:
            UserError: the name is taken, or a number is out of range.
        """
        if adapter_name in self.lora_A:
            raise UserError(f"LoRALinear: this layer already has an adapter named '{adapter_name}'")
        if r < 1 or not 0 <= lora_dropout < 1 or init_lora_weights not in (True, False, "gaussian"):
            raise UserError(
                f"LoRALinear: got r={r}, lora_dropout={lora_dropout}, init_lora_weights={init_lora_weights!r}; needs "
                "r >= 1, 0 <= lora_dropout < 1 and init_lora_weights True, False or 'gaussian'"
            )
        # Built on the CPU in PEFT's order of random draws, so that one seed gives the same start in both libraries.
        a = nn.Linear(self.in_features, r, bias=False, device="cpu", dtype=torch.float32)
        b = nn.Linear(r, self.out_features, bias=False, device="cpu", dtype=torch.float32)
        if init_lora_weights == "gaussian":
            nn.init.normal_(a.weight, std=1 / r)
        elif init_lora_weights:
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        if init_lora_weights:
            nn.init.zeros_(b.weight)
        self.lora_A[adapter_name] = a.to(self.weight.device)
        self.lora_B[adapter_name] = b.to(self.weight.device)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_dropout[adapter_name] = lora_dropout
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if use_rslora else r)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; merged weights that contain it are unmerged first.

        Args:
            adapter_name: an adapter of this layer; other names are ignored.
        """
        if adapter_name not in self.lora_A:
            return
        if adapter_name in self.merged_adapters:
            self.unmerge()
        del self.lora_A[adapter_name], self.lora_B[adapter_name]
        for table in (self.r, self.lora_alpha, self.lora_dropout, self.scaling):
            del table[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and the active adapters.

        Args:
            x: ``(..., k)``, in the base's compute dtype.
        Returns:
            ``(..., n)``, dtype of ``x``.
        """
        active = [] if self.adapters_disabled else [name for name in self.active_adapters if name in self.lora_A]
        if self.merged_weight is not None and not self.adapters_disabled:
            return F.linear(x, self.merged_weight, self.bias)
        if not active:
            y: Tensor = self.base_layer(x)
            return y
        first, *others = active
        a, b = self._factors(first)
        scale, dropout = self.scaling[first], self.lora_dropout[first]
        y = lora_linear(x, self._base_weight(), a, b, scale, self.bias, dropout, self.training)
        for name in others:
            a, b = self._factors(name)
            dropped = F.dropout(x.to(a.dtype), self.lora_dropout[name], self.training)
            y = y + (self.scaling[name] * F.linear(F.linear(dropped, a), b)).to(y.dtype)
        return y

    @torch.no_grad()
    def merged_dense_weight(self, adapter_names: Sequence[str] | None = None) -> Tensor:
        """Compute ``w + sum of s * B @ A`` in fp32 and round it once to the base's dtype; nothing is changed.

        Args:
            adapter_names: adapters to add; None for the active ones. Names this layer lacks add nothing.
        Returns:
            ``(n, k)``, dtype of the dense base or of the weight that the NF4 base was made from.
        """
        base = self._base_weight()
        if isinstance(base, NF4Weight):
            dtype, merged = base.dtype, nf4_dequantize(base, torch.float32)
        else:
            dtype, merged = base.dtype, base.detach().to(torch.promote_types(base.dtype, torch.float32), copy=True)
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.lora_A:
                a, b = self._factors(name)
                merged.addmm_(b.to(merged.dtype), a.to(merged.dtype), alpha=self.scaling[name])
        return merged.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Use one dense weight with the adapters folded in until ``unmerge``; the base layer stays as it is.

        Args:
            safe_merge: refuse a merged weight that holds NaN or Inf.
            adapter_names: adapters to merge; None for the active ones.
        Raises:
            UserError: ``safe_merge`` found a NaN or Inf.
        """
        names = [n for n in (self.active_adapters if adapter_names is None else adapter_names) if n in self.lora_A]
        if not names:
            return
        merged = self.merged_dense_weight(names)
        if safe_merge and not merged.isfinite().all():
            raise UserError(
                f"LoRALinear.merge: the weight merged with {names} holds NaN or Inf; the adapter is broken "
                f"or overflows {merged.dtype}"
            )
        self.merged_weight = merged
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Drop the merged weight and go back to base and adapters, exactly."""
        self.merged_weight = None
        self.merged_adapters = []

    def to_dense(self, adapter_names: Sequence[str] | None = None) -> nn.Linear:
        """Make a plain linear layer that computes what this one does with the adapters merged.

        Args:
            adapter_names: adapters to merge; None for the active ones.
        Returns:
            A frozen ``nn.Linear`` with a weight of its own (not shared with the base) and the base's bias.
        """
        weight = self.merged_dense_weight(adapter_names)
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=weight.dtype)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return cast(Tensor, self.lora_A[adapter_name].weight), cast(Tensor, self.lora_B[adapter_name].weight)

    def _base_weight(self) -> Tensor | NF4Weight:
        if isinstance(self.base_layer, NF4Linear):
            return self.base_layer.nf4
        return self.weight

    # What model code reads from a linear layer.

    @property
    def in_features(self) -> int:
        """Input features k of the base."""
        return cast(int, self.base_layer.in_features)

    @property
    def out_features(self) -> int:
        """Output features n of the base."""
        return cast(int, self.base_layer.out_features)

    @property
    def weight(self) -> Tensor:
        """The base's stored weight: dense ``(n, k)``, or the packed codes of an NF4 base."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        return cast("nn.Parameter | None", self.base_layer.bias)

    def extra_repr(self) -> str:
        """Ranks and scales by adapter, shown in ``print(model)``."""
        adapters = ", ".join(f"{name}(r={r}, scaling={self.scaling[name]:g})" for name, r in self.r.items())
        return f"adapters=[{adapters}], active={self.active_adapters}"
