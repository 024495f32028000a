"""(IA)^3 as a method: its configuration, which layers it scales, and putting the vectors there."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods.config_base import AdapterConfig
from fastpeft.methods.targets import AdapterPlan, is_adaptable, matches, plan_targets, replace_module
from fastpeft.nn import AdaptedLinear, IA3Linear
from fastpeft.nn.base_weight import is_transposed

# What PEFT scales in a model family when target_modules is not given; the last one is the feed-forward layer.
_DEFAULT_TARGETS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("k_proj", "v_proj", "down_proj"): ("llama", "mistral"),
    ("q_proj", "v_proj", "down_proj"): ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
    ("q_proj", "v_proj", "fc2"): ("phi", "bart"),
    ("q_proj", "k_proj", "fc2"): ("opt",),
    ("q_proj", "v_proj", "c_proj"): ("gpt_neo",),
    ("q_proj", "v_proj", "fc_out"): ("gptj",),
    ("c_attn", "mlp.c_proj"): ("gpt2", "gpt_bigcode"),
    ("query_key_value", "dense_4h_to_h"): ("gpt_neox", "falcon"),
    ("query_key_value", "mlp.dense_4h_to_h"): ("bloom",),
    ("key", "value", "output.dense"): ("bert", "roberta"),
    ("k", "v", "wo"): ("t5",),
}
# Mixtral's experts are parameters of one module, which vectors cannot stand beside.
_ATTENTION_ONLY: dict[tuple[str, ...], tuple[str, ...]] = {("k_proj", "v_proj"): ("mixtral",)}


@dataclass
class IA3Config(AdapterConfig):
    """(IA)^3: one trained vector a layer that scales its output, or a feed-forward layer's input.

    Trained are n numbers for a layer of weight ``(n, k)``, k for a feed-forward one; their fp32 values, and 8 bytes
    each of AdamW's state, are the extra memory.

    Args:
        target_modules: names of the layers to scale, as in LoraConfig; None takes PEFT's choice for the model family.
        exclude_modules: names, or one regular expression, of layers to leave out.
        feedforward_modules: those of the targets whose input is scaled.
        fan_in_fan_out: for layers that store their weight transposed; set by itself where they do.
        modules_to_save: names of modules of which a copy is trained whole.
        init_ia3_weights: begin with ones, which change nothing; False draws from a normal distribution.
        task_type: as in LoraConfig.
        base_model_name_or_path: as in LoraConfig.
        revision: as in LoraConfig.
        inference_mode: attach the adapter frozen.
    Raises:
        UserError: a value is out of range.
    Source:
        (IA)^3, arXiv 2205.05638; the keys are those of PEFT's ``IA3Config``.
    """

    PEFT_TYPE: ClassVar[str] = "IA3"

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self._tidy("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
        self._check_module_names()
        self._check_task_type()
        if isinstance(self.feedforward_modules, list) and isinstance(self.target_modules, list):
            foreign = sorted(set(self.feedforward_modules) - set(self.target_modules))
            if foreign:
                raise self._complain(f"feedforward_modules: {foreign} are not among target_modules; name them in both")


class IA3Method:
    """(IA)^3 on linear layers."""

    def plan(self, model: nn.Module, config: IA3Config, every_name: bool) -> AdapterPlan:
        """Resolve a configuration."""
        plan = plan_targets(model, config, every_name, {**_DEFAULT_TARGETS, **_ATTENTION_ONLY}, is_adaptable)
        resolved: IA3Config = plan.config
        if resolved.feedforward_modules is None:
            targets = resolved.target_modules if isinstance(resolved.target_modules, list) else []
            is_usual = config.target_modules is None and tuple(targets) in _DEFAULT_TARGETS
            resolved = dataclasses.replace(resolved, feedforward_modules=targets[-1:] if is_usual else [])
        modules = [model.get_submodule(name) for name in plan.targets]
        transposed = any(
            is_transposed(module.innermost() if isinstance(module, AdaptedLinear) else module) for module in modules
        )
        resolved = dataclasses.replace(resolved, fan_in_fan_out=transposed)
        for name, module in zip(plan.targets, modules, strict=True):
            feedforward = matches(resolved.feedforward_modules, name)
            if isinstance(module, IA3Linear) and module.is_feedforward != feedforward:
                raise UserError(
                    f"feedforward_modules: '{name}' has its {'input' if module.is_feedforward else 'output'} scaled by "
                    "another adapter of this model; a layer is a feed-forward one for all of them or for none"
                )
        return dataclasses.replace(plan, config=resolved)

    def inject(self, host: nn.Module, model: nn.Module, plan: AdapterPlan, adapter_name: str, undo: ExitStack) -> None:
        """Put vectors around the targets, outside of LoRA layers."""
        for name in plan.targets:
            module = model.get_submodule(name)
            if not isinstance(module, IA3Linear):
                undo.callback(replace_module, model, name, module)
                module = IA3Linear(module, matches(plan.config.feedforward_modules, name))
                replace_module(model, name, module)
            undo.callback(module.delete_adapter, adapter_name)
            module.add_adapter(adapter_name, plan.config.init_ia3_weights)
