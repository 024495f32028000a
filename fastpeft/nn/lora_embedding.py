"""LoRAEmbedding: a frozen embedding with trainable low-rank adapters.

    y[m,d] = w[v,d][ids] + s * (A^T[v,r][ids] @ B^T[r,d]) * c,      s = alpha / r

where c is the factor that the base puts on its rows (Gemma's ``embed_scale``), else 1. DoRA gives each of the d columns
of the sum a trained length (`fastpeft.nn.dora`). Trained are r (v + d) numbers an adapter, d more with DoRA, fp32.
Names are PEFT's: ``base_layer``, ``lora_embedding_A.<name>`` ``(r, v)``, ``lora_embedding_B.<name>`` ``(d, r)``,
``lora_magnitude_vector.<name>``. Merging leaves the base as it is, as in `fastpeft.nn.adapted_linear`.

PEFT (0.21) leaves c out of DoRA's low-rank term, so that merging changes what its model computes; here it is in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.nn.adapted import Adapted, on_rows
from fastpeft.nn.base_weight import with_parameters
from fastpeft.nn.dora import Magnitude


class LoRAEmbedding(Adapted):
    """A frozen embedding plus low-rank adapters.

    Args:
        base_layer: an ``nn.Embedding``; it is kept, not copied.
    Raises:
        UserError: the base is no embedding.
    Source:
        LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353.
    """

    merged_weight: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if not self.can_adapt(base_layer):
            raise UserError(f"LoRAEmbedding: cannot adapt a {type(base_layer).__name__}; needs torch.nn.Embedding")
        self.base_layer = base_layer
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.register_buffer("merged_weight", None, persistent=False)
        self.base_layer.requires_grad_(False)
        self.train(base_layer.training)

    @staticmethod
    def can_adapt(module: nn.Module) -> bool:
        """Whether ``module`` is an embedding with floating-point rows."""
        return isinstance(module, nn.Embedding) and module.weight.is_floating_point()

    def add_adapter(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
    ) -> None:
        """Add an adapter; it becomes active only when ``active_adapters`` names it.

        Args:
            adapter_name: a new name.
            r: rank.
            lora_alpha: numerator of the scale.
            use_rslora: scale by ``alpha / sqrt(r)``.
            init_lora_weights: False leaves A random, so that the output changes at once; else A is zero, B normal.
            use_dora: train the length of each column of the table too.
        """
        a, b = torch.randn(r, self.num_embeddings), torch.randn(self.embedding_dim, r)  # in PEFT's order of draws
        if init_lora_weights:
            a.zero_()
            b.normal_()
        device = self.weight.device
        self.lora_embedding_A[adapter_name] = nn.Parameter(a.to(device))
        self.lora_embedding_B[adapter_name] = nn.Parameter(b.to(device))
        self.r[adapter_name] = r
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if use_rslora else r)
        if use_dora:
            magnitude = self.lora_magnitude_vector[adapter_name] = Magnitude(self.weight.detach().t())
            magnitude.weight.data = self._norms(adapter_name)

    def held(self) -> list[str]:
        """Names of the adapters."""
        return list(self.lora_embedding_A.keys())

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; merged weights that contain it are unmerged first."""
        if adapter_name in self.lora_embedding_A:
            if adapter_name in self.merged_adapters:
                self.unmerge()
            for table in (self.lora_embedding_A, self.lora_embedding_B, self.r, self.scaling):
                del table[adapter_name]  # type: ignore[attr-defined]
            if adapter_name in self.lora_magnitude_vector:
                del self.lora_magnitude_vector[adapter_name]

    def parts(self, adapter_name: str) -> dict[str, str]:
        """A, B and, with DoRA, the lengths."""
        names = {f"lora_embedding_{part}.{adapter_name}": f"lora_embedding_{part}" for part in "AB"}
        if adapter_name in self.lora_magnitude_vector:
            names[f"lora_magnitude_vector.{adapter_name}.weight"] = "lora_magnitude_vector"
        return names

    def extra_parameters(self, adapter_name: str) -> list[Tensor]:
        """With DoRA, squared column lengths of the base."""
        held = adapter_name in self.lora_magnitude_vector
        return list(self.lora_magnitude_vector[adapter_name].buffers()) if held else []

    def load(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite values with saved ones."""
        super().load(adapter_name, tensors)
        if adapter_name in self.lora_magnitude_vector:
            cast(Magnitude, self.lora_magnitude_vector[adapter_name]).follow(self.weight.t())

    def forward(self, input: Tensor) -> Tensor:
        """Look up ``(...)`` ids: ``(..., d)``, dtype of the base."""
        if self.merged_weight is not None and not self.adapters_disabled and self.routing is None:
            y: Tensor = torch.func.functional_call(self.base_layer, {"weight": self.merged_weight}, (input,))
            return y
        base = y = self.base_layer(input)
        if self.routing is not None:
            return on_rows(y, input, self.routes(input.shape[0], input.device), self._update)
        for name in self.working():
            y = y + self._update(name, input, base).to(y.dtype)
        return y

    def _update(self, adapter_name: str, ids: Tensor, base: Tensor) -> Tensor:
        padding: int | None = self.base_layer.padding_idx  # type: ignore[assignment]
        rows = F.embedding(ids, self.lora_embedding_A[adapter_name].t(), padding_idx=padding)
        out: Tensor = self.scaling[adapter_name] * (rows @ self.lora_embedding_B[adapter_name].t())
        factor = getattr(self.base_layer, "embed_scale", None)
        if factor is not None:
            out = out * factor
        if adapter_name not in self.lora_magnitude_vector:
            return out
        stretch = cast(Tensor, self.lora_magnitude_vector[adapter_name].weight) / self._norms(adapter_name)
        return (stretch - 1) * base + stretch * out

    @torch.no_grad()
    def _norms(self, adapter_name: str) -> Tensor:
        """Column lengths ``(d,)`` of ``w + s (B A)^T``, fp32, under autocast too."""
        with torch.autocast(self.weight.device.type, enabled=False):
            a, b = self.factors(adapter_name)
            wa = (a.to(self.weight.dtype) @ self.weight).t()
            return cast(Magnitude, self.lora_magnitude_vector[adapter_name]).norms(wa, a, b, self.scaling[adapter_name])

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A ``(r, v)`` and B ``(d, r)``."""
        return self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]

    @torch.no_grad()
    def merged_dense_weight(self, adapter_names: Sequence[str] | None = None) -> Tensor:
        """Compute ``w + sum of s (B A)^T`` in fp32 and round it once to the base's dtype; nothing is changed."""
        weight = self.weight.detach()
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.lora_magnitude_vector:
                base, magnitude = weight.to(merged.dtype).t(), cast(Magnitude, self.lora_magnitude_vector[name])
                merged.add_(magnitude.at_length(base, *self.factors(name), self.scaling[name]).sub_(base).t())
            elif name in self.lora_embedding_A:
                a, b = (factor.to(merged.dtype) for factor in self.factors(name))
                merged.addmm_(a.t(), b.t(), alpha=self.scaling[name])
        return merged.to(weight.dtype)

    def holds_any(self, names: Sequence[str]) -> bool:
        """Whether one of the names acts here."""
        return bool(set(names) & set(self.held()))

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Use one dense weight with the adapters folded in until ``unmerge``; the base stays as it is."""
        names = [n for n in (self.active_adapters if adapter_names is None else adapter_names) if n in self.held()]
        if not names:
            return
        merged = self.merged_dense_weight(names)
        if safe_merge and not merged.isfinite().all():
            raise UserError(f"LoRAEmbedding.merge: the weight merged with {names} holds NaN or Inf")
        self.merged_weight, self.merged_adapters = merged, names

    def unmerge(self) -> None:
        """Drop the merged weight, exactly."""
        self.merged_weight, self.merged_adapters = None, []

    def to_dense(self, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """A frozen embedding of the base's class with the adapters merged into a weight of its own."""
        return with_parameters(self.base_layer, weight=self.merged_dense_weight(adapter_names)).train(self.training)

    def innermost(self) -> nn.Module:
        """The embedding itself."""
        return self.base_layer

    # What model code reads from an embedding.

    @property
    def weight(self) -> Tensor:
        """The base's rows ``(v, d)``."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary."""
        return cast(int, self.base_layer.num_embeddings)

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return cast(int, self.base_layer.embedding_dim)

    @property
    def padding_idx(self) -> int | None:
        """The base's padding token."""
        return cast("int | None", self.base_layer.padding_idx)

    def extra_repr(self) -> str:
        """Ranks and scales by adapter, shown in ``print(model)``."""
        adapters = ", ".join(f"{name}(r={r}, scaling={self.scaling[name]:g})" for name, r in self.r.items())
        return f"adapters=[{adapters}], active={self.active_adapters}"
