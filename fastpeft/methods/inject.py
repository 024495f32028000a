"""From a configuration to adapted layers: planning, and putting adapters in.

Two steps, so that a mistake never leaves a model half changed. ``plan_adapter`` reads model and configuration, resolves
every name, and raises with near names when something does not fit. ``inject_adapter`` carries a plan out and hands back
an ``ExitStack`` whose ``close()`` takes everything out again. What is done in between is each method's own (`METHODS`).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Protocol

from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods import bottleneck, ia3, lora, prompts
from fastpeft.methods.config_base import AdapterConfig
from fastpeft.methods.lora_config import LoraConfig
from fastpeft.methods.modules_to_save import ModulesToSaveWrapper
from fastpeft.methods.targets import AdapterPlan, wrap_module


class Method(Protocol):
    """A kind of adapter: what to change in a model. The modules it puts there are `fastpeft.nn.Adapted`, and know the
    rest: which adapters they hold, what of them trains, how they are saved, loaded, merged and taken out.
    """

    def plan(self, model: nn.Module, config: Any, every_name: bool) -> AdapterPlan:
        """Resolve a configuration against a model without changing either."""

    def inject(self, host: nn.Module, model: nn.Module, plan: AdapterPlan, adapter_name: str, undo: ExitStack) -> None:
        """Carry out a plan; each step leaves its undoing on the stack at once.

        Args:
            host: the wrapper around the model, for what belongs to no layer.
            model: the base model.
            plan: what to do.
            adapter_name: a new name.
            undo: how to take it back.
        """


METHODS: dict[type[AdapterConfig], Method] = {
    LoraConfig: lora.LoraMethod(),
    ia3.IA3Config: ia3.IA3Method(),
    prompts.PromptTuningConfig: prompts.PromptMethod(),
    prompts.PromptEncoderConfig: prompts.PromptMethod(),
    bottleneck.BottleneckAdapterConfig: bottleneck.BottleneckMethod(),
}


def plan_adapter(model: nn.Module, config: AdapterConfig, every_name: bool = True) -> AdapterPlan:
    """Resolve a configuration against a model without changing either.

    Args:
        model: the base model, plain or already holding adapters; its weights are not looked at and may be on the meta
            device.
        config: what to adapt.
        every_name: refuse names that match nothing while others match. Off for adapters read from files, where the
            file's tensors say what belongs to it.
    Returns:
        The plan.
    Raises:
        UserError: nothing matches, a name matches nothing, or something matched cannot be adapted.
    """
    return METHODS[type(config)].plan(model, config, every_name)


def inject_adapter(host: nn.Module, model: nn.Module, plan: AdapterPlan, adapter_name: str) -> ExitStack:
    """Put an adapter into a model; its parameters come trainable, and the layers it wraps frozen.

    Args:
        host: the wrapper around the model.
        model: the model that the plan was made for.
        plan: what to do.
        adapter_name: a name that no adapter of the model has.
    Returns:
        A stack whose ``close()`` removes the adapter and gives every parameter its ``requires_grad`` back.
    Raises:
        UserError: weights of the model are not loaded. Whatever is raised, the model is left as it was.
    """
    experts = dict.fromkeys(name.rpartition(".")[0] for name in plan.parameters)
    for name in (*plan.targets, *plan.modules_to_save, *experts):
        if any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
            raise UserError(
                f"the weight of '{name}' is on the meta device (not loaded, or offloaded); load the "
                "model whole before adding an adapter"
            )
    undo = ExitStack()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    undo.callback(lambda: [parameter.requires_grad_(flag) for parameter, flag in flags])
    try:
        METHODS[type(plan.config)].inject(host, model, plan, adapter_name, undo)
        for name in plan.modules_to_save:
            module = wrap_module(model, name, ModulesToSaveWrapper, undo)
            module.add_adapter(adapter_name)
            undo.callback(module.delete_adapter, adapter_name)
    except BaseException:
        undo.close()
        raise
    return undo
