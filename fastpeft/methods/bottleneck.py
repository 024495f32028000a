"""Bottleneck adapters as a method: their configuration, and which sublayers get one."""

from __future__ import annotations

import dataclasses
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods.config_base import AdapterConfig, is_number
from fastpeft.methods.targets import AdapterPlan
from fastpeft.nn import BottleneckAdapter, BottleneckSite
from fastpeft.nn.bottleneck import ACTIVATIONS

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
ATTENTION_SITE, OUTPUT_SITE = "attention_adapters", "output_adapters"

# What stands for None in a configuration, by its adapter_type.
_HOULSBY = {
    "mh_adapter": True,
    "output_adapter": True,
    "is_parallel": False,
    "reduction_factor": 16,
    "non_linearity": "swish",
    "ln_before": False,
    "ln_after": False,
    "scaling": 1.0,
    "init_weights": "zero",
}
_PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": _HOULSBY,
    "pfeiffer": {**_HOULSBY, "mh_adapter": False, "non_linearity": "relu"},
    "parallel": {
        **{**_HOULSBY, "mh_adapter": False, "is_parallel": True, "reduction_factor": 2},
        **{"non_linearity": "relu", "scaling": 4.0},
    },
    "parallel_adapter": {**_HOULSBY, "is_parallel": True, "ln_before": True, "init_weights": "xavier"},
    "linear_adapter": {**_HOULSBY, "ln_before": True, "init_weights": "xavier"},
}
_NEMO_DIM = 32


@dataclass
class BottleneckAdapterConfig(AdapterConfig):
    """Bottleneck adapters: small networks after or beside the attention and the MLP of every layer.

    A site of a model of hidden size d and bottleneck b trains 2 b d + b + d numbers, 2 d more for each LayerNorm and 1
    for a learned scaling; a model of L layers has 2 L sites ("houlsby" and both of NeMo's) or L.

    Fields that are None take the value of the ``adapter_type``:

    ===================  ======  ==========  =========================================================================
    type                 sites   b           else
    ===================  ======  ==========  =========================================================================
    "houlsby"            both    d / 16      after the sublayers, swish
    "pfeiffer"           MLP     d / 16      after the MLP, relu
    "parallel"           MLP     d / 2       beside the MLP, relu, scaling 4
    "parallel_adapter"   both    32          NeMo's: beside the sublayers, LayerNorm before, swish
    "linear_adapter"     both    32          NeMo's: after the sublayers, LayerNorm before, swish
    ===================  ======  ==========  =========================================================================

    Args:
        adapter_type: one of these.
        mh_adapter: at the attention.
        output_adapter: at the MLP (or the experts).
        is_parallel: beside the sublayer, reading its input, instead of after it.
        reduction_factor: b is d divided by this.
        bottleneck_size: b itself.
        non_linearity: "relu", "gelu", "swish", "tanh" or "leakyrelu".
        ln_before: LayerNorm on what the adapter reads.
        ln_after: LayerNorm on what it adds.
        dropout: of what it adds, in training.
        scaling: of what it adds; "learned" trains it, from 1.
        init_weights: "zero" (the model begins as its base), "xavier" (the same) or "bert" (all normal, deviation 0.02).
        leave_out: layers without adapters, counted from 0.
        task_type: as in LoraConfig.
        base_model_name_or_path: as in LoraConfig.
        revision: as in LoraConfig.
        inference_mode: attach the adapter frozen.
    Raises:
        UserError: a value is out of range.
    Source:
        Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247; He et al., arXiv 2110.04366; the names are
        AdapterHub's where it has the thing.
    """

    PEFT_TYPE: ClassVar[str] = "BOTTLENECK"
    MEANING: ClassVar[tuple[str, ...]] = ("is_parallel", "non_linearity", "scaling")

    adapter_type: str = "pfeiffer"
    mh_adapter: bool | None = None
    output_adapter: bool | None = None
    is_parallel: bool | None = None
    reduction_factor: float | None = None
    bottleneck_size: int | None = None
    non_linearity: str | None = None
    ln_before: bool | None = None
    ln_after: bool | None = None
    dropout: float = 0.0
    scaling: float | str | None = None
    init_weights: str | None = None
    leave_out: list[int] = dataclasses.field(default_factory=list)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self._check_choice("adapter_type", tuple(_PRESETS))
        is_nemo = self.adapter_type.endswith("_adapter")
        if self.bottleneck_size is None and self.reduction_factor is None and is_nemo:
            self.bottleneck_size = _NEMO_DIM
        for name, value in _PRESETS[self.adapter_type].items():
            if getattr(self, name) is None and not (name == "reduction_factor" and self.bottleneck_size is not None):
                setattr(self, name, value)
        self.leave_out = list(self.leave_out or [])
        self._check_choice("non_linearity", tuple(ACTIVATIONS))
        self._check_choice("init_weights", ("zero", "xavier", "bert"))
        self._check_probability("dropout")
        self._check_task_type()
        if self.bottleneck_size is not None:
            self._check_whole("bottleneck_size")
            if self.reduction_factor is not None:
                raise self._complain("reduction_factor and bottleneck_size say the same thing; give one of them")
        elif not is_number(self.reduction_factor) or not self.reduction_factor > 0:  # type: ignore[operator]
            raise self._complain(f"reduction_factor={self.reduction_factor!r}; must be a number above 0")
        if self.scaling != "learned" and not is_number(self.scaling):
            raise self._complain(f"scaling={self.scaling!r}; must be a number, or 'learned'")
        if not self.mh_adapter and not self.output_adapter:
            raise self._complain("mh_adapter and output_adapter are both off; there is nothing to train")
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.leave_out):
            raise self._complain(f"leave_out={self.leave_out!r}; must be layer numbers, counted from 0")

    def bottleneck_of(self, width: int) -> int:
        """Size b for a model of hidden size ``width``."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        assert self.reduction_factor is not None
        return max(1, int(width // self.reduction_factor))


class BottleneckMethod:
    """Bottleneck adapters on the layers of a model."""

    def plan(self, model: nn.Module, config: BottleneckAdapterConfig, every_name: bool) -> AdapterPlan:
        """Find the sublayers."""
        layers = [(name, *found) for name, module in model.named_modules() if (found := _sublayers(module))]
        if not layers:
            raise UserError(
                f"{type(model).__name__}: no layer with an attention ({', '.join(_ATTENTION)}) and an MLP "
                f"({', '.join(_MLP)}) was found; bottleneck adapters need these, use LoraConfig"
            )
        _hidden_size(model)
        numbers = {_number(name) for name, *_ in layers}
        absent = sorted(set(config.leave_out) - numbers)
        if absent:
            raise UserError(
                f"leave_out: there is no layer {', '.join(map(str, absent))}; the model's are {min(numbers)} to "
                f"{max(numbers)}"
            )
        targets = []
        for name, attention, mlp in layers:
            if _number(name) not in config.leave_out:
                targets += [f"{name}.{attention}"] if config.mh_adapter else []
                targets += [f"{name}.{mlp}"] if config.output_adapter else []
        if not targets:
            raise UserError("leave_out: all layers are left out; there is nothing to train")
        return AdapterPlan(config, tuple(targets))

    def inject(self, host: nn.Module, model: nn.Module, plan: AdapterPlan, adapter_name: str, undo: ExitStack) -> None:
        """Put an adapter on each sublayer."""
        config, width = plan.config, _hidden_size(model)
        for target in plan.targets:
            parent, _, child = target.rpartition(".")
            layer, sublayer = model.get_submodule(parent), model.get_submodule(target)
            place = ATTENTION_SITE if child in _ATTENTION else OUTPUT_SITE
            site = layer._modules.get(place)
            if site is None:
                site = BottleneckSite(sublayer)
                layer.add_module(place, site)
                undo.callback(remove_site, layer, place)
            assert isinstance(site, BottleneckSite)
            undo.callback(site.delete_adapter, adapter_name)
            adapter = BottleneckAdapter(
                width,
                config.bottleneck_of(width),
                config.non_linearity,
                config.ln_before,
                config.ln_after,
                config.dropout,
                config.scaling,
                config.init_weights,
            )
            device = next((p.device for p in sublayer.parameters()), None)
            site.add_adapter(adapter_name, adapter.to(device).train(layer.training), config.is_parallel)


def remove_site(layer: nn.Module, place: str) -> None:
    """Take a site, with all its adapters, out of a layer.

    Args:
        layer: the layer that holds it.
        place: its name there.
    """
    site = layer._modules.pop(place)
    assert isinstance(site, BottleneckSite)
    names = _ATTENTION if place == ATTENTION_SITE else _MLP
    for name in names:
        if isinstance(sublayer := layer._modules.get(name), nn.Module):
            site.leave(sublayer)


def _sublayers(module: nn.Module) -> tuple[str, str] | None:
    """Names of the attention and the MLP of a layer; None for what is no layer."""
    attention = next((name for name in _ATTENTION if isinstance(module._modules.get(name), nn.Module)), None)
    mlp = next((name for name in _MLP if isinstance(module._modules.get(name), nn.Module)), None)
    return (attention, mlp) if attention and mlp else None


def _number(name: str) -> int:
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else 0


def _hidden_size(model: nn.Module) -> int:
    whole: Any = getattr(model, "config", None)
    text = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    size = getattr(text, "hidden_size", None)
    if not isinstance(size, int):
        raise UserError(f"{type(model).__name__}: it has no config with a hidden_size, which bottleneck adapters need")
    return size
