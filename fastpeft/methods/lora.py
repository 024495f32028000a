"""LoRA as a method: which layers it adapts, and putting it there."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods.lora_config import LoraConfig
from fastpeft.methods.targets import AdapterPlan, is_adaptable, plan_targets, replace_module, wrap_module
from fastpeft.nn import IA3Linear, LoRAEmbedding, LoRAExperts, LoRALinear, NF4Linear
from fastpeft.nn.base_weight import is_transposed

# What PEFT adapts in a model family when target_modules is not given.
_DEFAULT_TARGETS = {
    ("q_proj", "v_proj"): (
        *("llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "stablelm"),
        *("opt", "gptj", "gpt_neo", "bart"),
    ),
    ("q_proj", "v_proj", "fc1", "fc2"): ("phi",),
    ("query_key_value",): ("gpt_neox", "bloom", "falcon"),
    ("query", "value"): ("bert", "roberta", "xlm-roberta", "electra"),
    ("q", "v"): ("t5", "mt5"),
    ("c_attn",): ("gpt2", "gpt_bigcode"),
}
# Layers of one parent that read the same input, for ``shared_a``.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))


class LoraMethod:
    """LoRA on linear layers, embeddings and a mixture's experts."""

    def plan(self, model: nn.Module, config: LoraConfig, every_name: bool) -> AdapterPlan:
        """Resolve a configuration."""
        plan = plan_targets(model, config, every_name, _DEFAULT_TARGETS, _can_adapt)
        modules = {name: model.get_submodule(name) for name in plan.targets}
        for name, module in modules.items():
            if _is_embedding(module):
                _check_embedding(config, name)
        innermost = [_innermost(module) for module in modules.values()]
        # A packed weight no longer says how its layer stored it.
        transposed = any(map(is_transposed, innermost)) or (
            config.fan_in_fan_out and any(isinstance(module, NF4Linear) for module in innermost)
        )
        if config.fan_in_fan_out and not transposed:
            raise UserError(
                "fan_in_fan_out=True is for layers with transposed weights (GPT-2's Conv1D), and none of the targets "
                "is one; leave it out for torch.nn.Linear"
            )
        ranks = {name: config.rank_of(name) for name in plan.targets}
        for group in layers_of_one_input(plan) if config.shared_a else ():
            if len({ranks[name] for name in group}) > 1:
                raise UserError(
                    f"shared_a: {', '.join(group)} have ranks {', '.join(str(ranks[name]) for name in group)}; layers "
                    "that share an A need one rank, change rank_pattern"
                )
        return dataclasses.replace(plan, config=dataclasses.replace(plan.config, fan_in_fan_out=transposed))

    def inject(self, host: nn.Module, model: nn.Module, plan: AdapterPlan, adapter_name: str, undo: ExitStack) -> None:
        """Put LoRA layers around the targets, or a further adapter into those that are there."""
        shared = (
            {name: group[0] for group in layers_of_one_input(plan) for name in group} if plan.config.shared_a else {}
        )
        for name in plan.targets:
            module = model.get_submodule(name)
            if _is_embedding(module):
                self._inject_embedding(model, name, plan.config, adapter_name, undo)
                continue
            while isinstance(module, IA3Linear):  # stays outermost
                name, module = f"{name}.base_layer", module.base_layer
            first = shared.get(name.removesuffix(".base_layer"), name)
            a = None if first == name else _lora_at(model, first).lora_A[adapter_name]
            self._inject_linear(model, name, plan, adapter_name, a, undo)
        by_module: dict[str, list[str]] = {}
        for name in plan.parameters:
            path, _, weight = name.rpartition(".")
            by_module.setdefault(path, []).append(weight)
        for path, weights in by_module.items():
            self._inject_experts(model, path, weights, plan.config, adapter_name, undo)

    def _inject_linear(
        self,
        model: nn.Module,
        name: str,
        plan: AdapterPlan,
        adapter_name: str,
        shared_a: nn.Module | None,
        undo: ExitStack,
    ) -> None:
        module, place, config = model.get_submodule(name), name.removesuffix(".base_layer"), plan.config
        start = True if plan.from_file and config.init_lora_weights == "loftq" else config.init_lora_weights
        options = {
            "r": config.rank_of(place),
            "lora_alpha": config.alpha_of(place),
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "init_lora_weights": start,
            "use_dora": config.use_dora,
            "shared_a": shared_a,
            "loftq_iterations": config.loftq_iterations,
            "start_follows": plan.holds_start,
        }
        if isinstance(module, LoRALinear):
            if start == "loftq":
                raise UserError(
                    "init_lora_weights='loftq' replaces the base's weights, on which the model's other adapters were "
                    "trained; begin with it, or use another start"
                )
            undo.callback(module.delete_adapter, adapter_name)
            module.add_adapter(adapter_name, **options)  # type: ignore[arg-type]
        else:
            replace_module(model, name, LoRALinear(module, adapter_name, **options))  # type: ignore[arg-type]
            undo.callback(replace_module, model, name, module)

    def _inject_embedding(
        self, model: nn.Module, name: str, config: LoraConfig, adapter_name: str, undo: ExitStack
    ) -> None:
        module = wrap_module(model, name, LoRAEmbedding, undo)
        undo.callback(module.delete_adapter, adapter_name)
        rank, alpha = config.rank_of(name), config.alpha_of(name)
        start, dora = config.init_lora_weights, config.use_dora
        module.add_adapter(adapter_name, rank, alpha, config.use_rslora, start, dora)

    def _inject_experts(
        self, model: nn.Module, path: str, weights: list[str], config: LoraConfig, adapter_name: str, undo: ExitStack
    ) -> None:
        module = wrap_module(model, path, LoRAExperts, undo)
        undo.callback(module.delete_adapter, adapter_name)
        ranks = {weight: config.rank_of(f"{path}.{weight}") for weight in weights}
        alphas = {weight: config.alpha_of(f"{path}.{weight}") for weight in weights}
        module.add_adapter(adapter_name, ranks, alphas, config.use_rslora, config.init_lora_weights)


def layers_of_one_input(plan: AdapterPlan) -> list[list[str]]:
    """Targets that read the same input, in order, at least two each."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in plan.targets:
        parent, _, leaf = name.rpartition(".")
        for names in _SAME_INPUT:
            if leaf in names:
                groups.setdefault((parent, names), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _lora_at(model: nn.Module, name: str) -> LoRALinear:
    module = model.get_submodule(name)
    while isinstance(module, IA3Linear):
        module = module.base_layer
    assert isinstance(module, LoRALinear)
    return module


def _innermost(module: nn.Module) -> nn.Module:
    return module.innermost() if isinstance(module, (LoRALinear, IA3Linear, LoRAEmbedding)) else module


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, LoRAEmbedding) or LoRAEmbedding.can_adapt(module)


def _can_adapt(module: nn.Module) -> bool:
    return is_adaptable(module) or _is_embedding(module)


def _check_embedding(config: LoraConfig, name: str) -> None:
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
        raise UserError(
            f"init_lora_weights='{config.init_lora_weights}' is for linear layers, and '{name}' is an embedding; leave "
            "one of them out"
        )
