"""LoRALinear: a frozen linear layer with trainable low-rank adapters beside it.

    y[m,n] = x[m,k] @ w[n,k]^T + bias + s * dropout(x)[m,k] @ A[r,k]^T @ B[n,r]^T,      s = alpha / r

The base (dense or NF4) and its first active adapter go through one fused op; the adapters are fp32 master weights
whatever the base's dtype. A layer holds any number of adapters by name; several may be active at once, and their
low-rank terms add up. Submodules are named as PEFT names them (``base_layer``, ``lora_A.<name>``, ``lora_B.<name>``,
``lora_magnitude_vector.<name>``), so that parameter names and files agree.

DoRA scales each row of the sum to a trained length (`fastpeft.nn.dora`).

Trained: r (k + n) numbers an adapter, n more with DoRA; r k less for each layer that shares another's A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.nn.adapted import on_rows
from fastpeft.nn.adapted_linear import AdaptedLinear
from fastpeft.nn.base_weight import dense_weight, operand
from fastpeft.nn.dora import Magnitude
from fastpeft.nn.lora_init import STARTS, begins_in_base, is_known_start, loftq_start, plain_start, principal_start
from fastpeft.nn.nf4 import NF4Linear
from fastpeft.ops import NF4Weight, lora_linear, nf4_linear


class LoRALinear(AdaptedLinear):
    """A frozen linear layer plus low-rank adapters.

    Args:
        base_layer: the layer to adapt, ``nn.Linear``, ``Conv1D`` or ``NF4Linear`` of weight ``(n, k)``; it is kept, not
            copied.
        adapter_name: name of the first adapter.
        r: its rank.
        lora_alpha: numerator of its scale.
        lora_dropout: probability of dropping an input element of the low-rank path, in training.
        use_rslora: scale by ``alpha / sqrt(r)`` instead of ``alpha / r``.
        init_lora_weights: how A and B begin (`fastpeft.nn.lora_init`).
        use_dora: train the length of each row of the weight too.
    Raises:
        UserError: the base is not a linear layer that can be adapted, or a number is out of range.
    Source:
        LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        *,
        shared_a: nn.Linear | None = None,
        loftq_iterations: int = 1,
        start_follows: bool = False,
    ) -> None:
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.lora_start = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.active_adapters = [adapter_name]
        self.add_adapter(
            adapter_name,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            init_lora_weights,
            use_dora,
            shared_a=shared_a,
            loftq_iterations=loftq_iterations,
            start_follows=start_follows,
        )

    def add_adapter(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        *,
        shared_a: nn.Linear | None = None,
        loftq_iterations: int = 1,
        start_follows: bool = False,
    ) -> None:
        """Add an adapter; it becomes active only when ``active_adapters`` names it.

        Args:
            adapter_name: a new name.
            r: rank.
            lora_alpha: numerator of the scale.
            lora_dropout: as for the class.
            use_rslora: as for the class.
            init_lora_weights: as for the class. "loftq" replaces a dense base by an NF4 one.
            use_dora: as for the class.
            shared_a: A of another layer with the same input, to train as one.
            loftq_iterations: turns of quantising and decomposing, with "loftq".
            start_follows: leave room for starting factors, which are loaded next, instead of deriving them.
        Raises:
            UserError: the name is taken, or a number is out of range.
        """
        if adapter_name in self.lora_A:
            raise UserError(f"LoRALinear: this layer already has an adapter named '{adapter_name}'")
        if r < 1 or not 0 <= lora_dropout < 1 or not is_known_start(init_lora_weights):
            raise UserError(
                f"LoRALinear: got r={r}, lora_dropout={lora_dropout}, init_lora_weights={init_lora_weights!r}; needs "
                f"r >= 1, 0 <= lora_dropout < 1 and init_lora_weights {STARTS}"
            )
        scale = lora_alpha / (math.sqrt(r) if use_rslora else r)
        a, b = plain_start(self.out_features, self.in_features, r, init_lora_weights)
        start = None
        if begins_in_base(init_lora_weights):
            if not start_follows:
                weight, _ = dense_weight(self.base_layer)
                a.weight.data, b.weight.data = principal_start(weight, r, scale, str(init_lora_weights))
            start = _Start(a.weight.detach().clone(), b.weight.detach().clone())
        elif init_lora_weights == "loftq":
            weight, dtype = dense_weight(self.base_layer)
            packed, a.weight.data, b.weight.data = loftq_start(weight, dtype, r, scale, loftq_iterations)
            self.base_layer = NF4Linear(packed, self.bias).train(self.base_layer.training)
        device = self.weight.device
        self.lora_A[adapter_name] = a.to(device) if shared_a is None else shared_a
        self.lora_B[adapter_name] = b.to(device)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_dropout[adapter_name] = lora_dropout
        self.scaling[adapter_name] = scale
        if start is not None:
            self.lora_start[adapter_name] = start.to(device)
        if use_dora:
            magnitude = self.lora_magnitude_vector[adapter_name] = Magnitude(dense_weight(self.base_layer)[0])
            magnitude.weight.data = self._norms(adapter_name)

    def held(self) -> list[str]:
        """Names of the adapters."""
        return list(self.lora_A)

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
        for modules in (self.lora_magnitude_vector, self.lora_start):
            if adapter_name in modules:
                del modules[adapter_name]
        for table in (self.r, self.lora_alpha, self.lora_dropout, self.scaling):
            del table[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def set_dropout(self, p: float) -> None:
        """Give all adapters of this layer another dropout."""
        self.lora_dropout = dict.fromkeys(self.lora_dropout, p)

    # Values, for files.

    def parts(self, adapter_name: str) -> dict[str, str]:
        """A, B and, with DoRA, the lengths."""
        names = {f"lora_{part}.{adapter_name}.weight": f"lora_{part}.weight" for part in "AB"}
        if adapter_name in self.lora_magnitude_vector:
            names[f"lora_magnitude_vector.{adapter_name}.weight"] = "lora_magnitude_vector"
        return names

    def extra_parameters(self, adapter_name: str) -> list[Tensor]:
        """Starting factors, and row lengths of the base."""
        modules = (self.lora_start, self.lora_magnitude_vector)
        return [buffer for part in modules if adapter_name in part for buffer in part[adapter_name].buffers()]

    def saved(self, adapter_name: str, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Own tensors; with starting factors A and B of the update of rank 2 r, ``[A; A0]`` and ``[B, -B0]``."""
        tensors = super().saved(adapter_name, get)
        if adapter_name in self.lora_start:
            a0, b0 = (get(f"lora_start.{adapter_name}.{part}") for part in ("a", "b"))
            tensors["lora_A.weight"] = torch.cat((tensors["lora_A.weight"], a0))
            tensors["lora_B.weight"] = torch.cat((tensors["lora_B.weight"], -b0), 1)
        return tensors

    def as_saved(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's files of PiSSA and OLoRA hold A and B alone; the starting factors are those of the base here."""
        tensors = dict(tensors)
        if adapter_name in self.lora_start:
            r, start = self.r[adapter_name], self.lora_start[adapter_name]
            a, b = (tensors.get(f"lora_{part}.weight") for part in "AB")
            if a is not None and b is not None and a.shape[0] == b.shape[1] == r:
                a0, b0 = (cast(Tensor, factor).to(a.device) for factor in (start.a, start.b))
                tensors["lora_A.weight"], tensors["lora_B.weight"] = torch.cat((a, a0)), torch.cat((b, -b0), 1)
        return tensors

    @torch.no_grad()
    def load(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite values with saved ones."""
        if adapter_name in self.lora_start:
            tensors, start, r = dict(tensors), self.lora_start[adapter_name], self.r[adapter_name]
            if "lora_A.weight" in tensors:
                tensors["lora_A.weight"], a0 = tensors["lora_A.weight"].split(r)
                cast(Tensor, start.a).copy_(a0)
            if "lora_B.weight" in tensors:
                tensors["lora_B.weight"], b0 = tensors["lora_B.weight"].split(r, 1)
                cast(Tensor, start.b).copy_(-b0)
        super().load(adapter_name, tensors)
        if adapter_name in self.lora_magnitude_vector:
            cast(Magnitude, self.lora_magnitude_vector[adapter_name]).follow(dense_weight(self.base_layer)[0])

    # Computing.

    def is_product(self, adapter_name: str) -> bool:
        """Whether an adapter's A and B, as they are, enter `fastpeft.ops.lora_linear`, and nothing else does."""
        return adapter_name not in self.lora_magnitude_vector and adapter_name not in self.lora_start

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base and the active adapters.

        Args:
            x: ``(..., k)``, in the base's compute dtype.
        Returns:
            ``(..., n)``, dtype of ``x``.
        """
        merged = self._merged_forward(x)
        if merged is not None:
            return merged
        if self.routing is not None:
            base = self.base_layer(x)
            return on_rows(base, x, self.routes(x.shape[0], x.device), self._update)
        active = self.working()
        if not active:
            y: Tensor = self.base_layer(x)
            return y
        if any(name in self.lora_magnitude_vector for name in active):
            base = y = self.base_layer(x)
        else:
            first, *active = active
            a, b = self.factors(first)
            scale, dropout = self.scaling[first], self.lora_dropout[first]
            base = y = lora_linear(x, operand(self.base_layer), a, b, scale, self.bias, dropout, self.training)
        for name in active:
            y = y + self._update(name, x, base)
        return y

    def _update(self, adapter_name: str, x: Tensor, base: Tensor) -> Tensor:
        """What an adapter adds to the base's output."""
        a, b = self.factors(adapter_name)
        dropout = self.lora_dropout[adapter_name] if self.training else 0.0
        dropped = F.dropout(x.to(a.dtype), dropout)
        low_rank = self.scaling[adapter_name] * F.linear(F.linear(dropped, a), b)
        if adapter_name not in self.lora_magnitude_vector:
            return low_rank.to(base.dtype)
        if dropout:
            base = self.base_layer(dropped.to(x.dtype))
        if self.bias is not None:
            base = base - self.bias
        stretch = cast(Tensor, self.lora_magnitude_vector[adapter_name].weight) / self._norms(adapter_name)
        return ((stretch - 1) * base + stretch * low_rank).to(base.dtype)

    @torch.no_grad()
    def _norms(self, adapter_name: str) -> Tensor:
        """Row norms ``(n,)`` of ``w + s B A``, fp32, under autocast too."""
        with torch.autocast(self.weight.device.type, enabled=False):
            a, b = self.factors(adapter_name)
            weight = operand(self.base_layer)
            if isinstance(weight, NF4Weight):
                aw = nf4_linear(a, weight)
            else:
                aw = F.linear(a.to(weight.dtype), weight)
            magnitude = cast(Magnitude, self.lora_magnitude_vector[adapter_name])
            return magnitude.norms(aw.t(), a, b, self.scaling[adapter_name])

    @torch.no_grad()
    def merged(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """``w + sum of s B A``, in the base's dtype or fp32, whichever is finer."""
        weight, bias, dtype = self._inner(names)
        base = weight.clone() if any(name in self.lora_magnitude_vector for name in names) else weight
        for name in names:
            if name in self.lora_A:
                a, b = (factor.to(weight.dtype) for factor in self.factors(name))
                if name in self.lora_magnitude_vector:
                    magnitude = cast(Magnitude, self.lora_magnitude_vector[name])
                    weight.add_(magnitude.at_length(base, a, b, self.scaling[name]).sub_(base))
                else:
                    weight.addmm_(b, a, alpha=self.scaling[name])
        return weight, bias, dtype

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A and B whose scaled product the adapter adds to the weight; with starting factors of rank 2 r."""
        a, b = cast(Tensor, self.lora_A[adapter_name].weight), cast(Tensor, self.lora_B[adapter_name].weight)
        if adapter_name in self.lora_start:
            start = self.lora_start[adapter_name]
            return torch.cat((a, cast(Tensor, start.a))), torch.cat((b, -cast(Tensor, start.b)), 1)
        return a, b

    def extra_repr(self) -> str:
        """Ranks and scales by adapter, shown in ``print(model)``."""
        adapters = ", ".join(f"{name}(r={r}, scaling={self.scaling[name]:g})" for name, r in self.r.items())
        return f"adapters=[{adapters}], active={self.active_adapters}"


class _Start(nn.Module):
    """The factors that an adapter began with, frozen."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)
