"""fastpeft's packed layers and fused LoRA under the PEFT library, and so under TRL's trainers.

PEFT knows the layers of bitsandbytes, not ours; ``LoraConfig._register_custom_module`` is its place to name others.
The layer registered is PEFT's own ``lora.Linear`` with two differences: one active, plain adapter goes through the
fused op, and an ``NF4Linear`` base merges into a dense layer that takes its place, so that unmerging is exact. Names,
files and everything else are PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.nn import LoRALinear, NF4Linear
from fastpeft.ops import lora_linear

if TYPE_CHECKING:
    import peft

_Config = TypeVar("_Config", bound="peft.LoraConfig")


def use_in_peft(config: _Config, dense: bool = True) -> _Config:
    """Make PEFT put fastpeft's LoRA into the layers that a configuration names.

    ``peft.get_peft_model(model, use_in_peft(peft.LoraConfig(...)))``; the same goes for ``peft_config`` of TRL's
    trainers. PEFT does not save this, so it is said again when an adapter is loaded:
    ``PeftModel.from_pretrained(model, path, config=use_in_peft(peft.LoraConfig.from_pretrained(path)))``.

    Args:
        config: a ``peft.LoraConfig``; changed.
        dense: for ``nn.Linear`` too, not only for ``NF4Linear``.
    Returns:
        The same configuration.
    Raises:
        UserError: PEFT is not installed, or it is no ``peft.LoraConfig``.
    """
    fused = fused_lora_class()
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise UserError(
            f"use_in_peft: got a {type(config).__module__}.{type(config).__name__}; needs a peft.LoraConfig "
            "(fastpeft's own LoraConfig goes to fastpeft.get_peft_model)"
        )
    kinds: tuple[type[nn.Module], ...] = (NF4Linear, nn.Linear) if dense else (NF4Linear,)
    config._register_custom_module(dict.fromkeys(kinds, fused))
    return config


@cache
def fused_lora_class() -> type[nn.Module]:
    """The layer that ``use_in_peft`` registers; made on first use, because PEFT is optional.

    Raises:
        UserError: PEFT is not installed.
    """
    try:
        from peft.tuners.lora.layer import Linear, LoraVariant
        from peft.tuners.tuners_utils import check_adapters_to_merge
    except ImportError as error:
        raise UserError("use_in_peft: needs the package peft: pip install peft") from error

    class FusedLora(Linear):
        """PEFT's LoRA of a linear layer, computed by fastpeft."""

        base_layer: Any
        _packed: tuple[NF4Linear, ...] = ()  # what merging has set aside; in a tuple, so that it is no submodule

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
            if isinstance(module, NF4Linear):
                return module.in_features, module.out_features  # PEFT's own finds them too, with a warning
            return super()._get_in_out_features(module)  # type: ignore[no-any-return]

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = None if args or kwargs else self._fusable(x)
            if name is None:
                return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
            base = self.base_layer
            dropout = self.lora_dropout[name]
            return lora_linear(
                x,
                base.nf4 if isinstance(base, NF4Linear) else base.weight,
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                self.scaling[name],
                base.bias,
                dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
                dropout.training,
            )

        def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
            base = self.base_layer
            if not isinstance(base, NF4Linear) or not check_adapters_to_merge(self, adapter_names):
                super().merge(safe_merge, adapter_names)
                return
            dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(base.dequantize(), requires_grad=False)
            dense.register_parameter("bias", base.bias)
            self.base_layer, self._packed = dense, (base,)
            try:
                super().merge(safe_merge, adapter_names)
            except BaseException:
                self.base_layer, self._packed = base, ()
                raise

        def unmerge(self) -> None:
            if not self._packed:
                super().unmerge()
                return
            (self.base_layer,), self._packed = self._packed, ()
            self.merged_adapters.clear()

        def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> LoraVariant | None:
            variant = super().resolve_lora_variant(config=config, **kwargs)
            if variant is not None and isinstance(self.get_base_layer(), NF4Linear):
                raise UserError(
                    f"use_in_peft: {type(variant).__name__} reads the base's dense weight, which a packed layer does "
                    "not have; use plain LoRA or rsLoRA, fastpeft.get_peft_model, or a dense base"
                )
            return variant

        def _fusable(self, x: Tensor) -> str | None:
            """The one adapter that is all there is to add, if the fused op computes what PEFT would."""
            active = [name for name in self.active_adapters if name in self.lora_A]
            if len(active) != 1 or self.disable_adapters or self.merged or self.fan_in_fan_out:
                return None
            (name,) = active
            base = self.base_layer
            factors = (self.lora_A[name], self.lora_B[name])
            plain = (
                name not in self.lora_variant
                and not self.lora_bias[name]
                and LoRALinear.can_adapt(base)
                and all(type(factor) is nn.Linear for factor in factors)
                and x.is_floating_point()
                and (isinstance(base, NF4Linear) or (x.dtype == base.weight.dtype and x.dtype != torch.float64))
            )
            return name if plain else None

    return FusedLora
