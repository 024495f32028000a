"""AdapterHost: the wrapper around a model that holds its adapters, without what users do with them.

It passes calls and attributes on, attaches adapters (all or nothing), keeps track of which act and train, and leads
each sample of a mixed batch to its own. `fastpeft.methods.model` puts the public methods on top.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods import merging, saving
from fastpeft.methods.config_base import AdapterConfig
from fastpeft.methods.files import AdapterFile, LoadReport
from fastpeft.methods.inject import METHODS, inject_adapter, plan_adapter
from fastpeft.nn import Adapted, LoRALinear, PromptEncoder, Prompts
from fastpeft.nn.adapted import BASE, routed, routing_again

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]+")
_CHECKPOINT = "_gradient_checkpointing_func"  # of transformers' layers


class BaseModel(nn.Module):
    """The layer of naming between ``PeftModel`` and the wrapped model; it computes nothing itself.

    Args:
        model: the model whose layers hold the adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not yet set up: copying and unpickling ask early
                raise
            return getattr(self.model, name)


class AdapterHost(nn.Module):
    """A model, frozen, with adapters by name; `fastpeft.PeftModel` says more.

    Args:
        model: the model to adapt; its layers are changed in place.
        peft_config: the first adapter.
        adapter_name: its name.
        weights: a saved adapter to fill it with.
        strict: refuse weights that do not fit exactly.
    Raises:
        UserError: the adapter cannot be attached or its weights do not fit; the model is left as it was.
    """

    # How transformers' Trainer asks whether a quantised model has something to train.
    _hf_peft_config_loaded = True
    takes_prompts = False

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig,
        adapter_name: str = "default",
        *,
        weights: AdapterFile | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(model, AdapterHost):
            raise UserError(
                "PeftModel: the model has adapters already; use its add_adapter or load_adapter for a further one"
            )
        if any(isinstance(module, Adapted) for module in model.modules()):
            raise UserError(
                "PeftModel: the model's layers hold adapters already; go on with the PeftModel that was made from it, "
                "or take them out with its unload()"
            )
        self.peft_config: dict[str, Any] = {}
        self.active_adapters: list[str] = [adapter_name]
        self.base_model = BaseModel(model)
        self.train(model.training)
        self._attach(adapter_name, peft_config, weights, strict)

    # Calls and attributes of the wrapped model.

    def forward(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Run the wrapped model with its active adapters.

        Args:
            args: the wrapped model's.
            adapter_names: for each sample of the batch the one adapter that acts on it, active or not; None or
                "__base__" for none. Only active adapters train.
            kwargs: the wrapped model's.
        """
        with self._routing(adapter_names):
            return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Generate with the wrapped model and its active adapters, or those named for each sample."""
        with self._routing(adapter_names):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def get_base_model(self) -> nn.Module:
        """The wrapped model, adapters included."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not yet set up: copying and unpickling ask early
                raise
            return getattr(self.base_model, name)

    @property
    def active_adapter(self) -> str:
        """The first active adapter."""
        return self.active_adapters[0]

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens that the active adapters put before every text; they count in length limits."""
        configs = (self.peft_config[name] for name in self.active_adapters if name in self.peft_config)
        return sum(getattr(config, "num_virtual_tokens", 0) for config in configs)

    def unmerge_adapter(self) -> None:
        """Go back to base and adapters, exactly as they were."""
        for _, module in merging.mergeable(self.get_base_model()):
            module.unmerge()

    # Inside.

    def _attach(
        self, adapter_name: str, config: AdapterConfig, weights: AdapterFile | None = None, strict: bool = True
    ) -> LoadReport | None:
        """Plan, inject and fill one adapter, or leave everything as it was."""
        self._check_new(adapter_name, config)
        base = self.get_base_model()
        plan = plan_adapter(base, config, every_name=weights is None)
        if weights is not None:
            plan = dataclasses.replace(plan, from_file=True, holds_start=weights.holds_start)
        undo = inject_adapter(self, base, plan, adapter_name)
        try:
            first = not self.peft_config
            self.peft_config[adapter_name] = plan.config
            if first:
                base.requires_grad_(False)
            self._sync()
            if weights is None:
                return None
            report = saving.fill(self, adapter_name, plan.config, weights, strict)
            self.unmerge_adapter()  # what was merged held the old values
            self._warn_of_lost_encoder(adapter_name, plan.config)
        except BaseException:
            del self.peft_config[adapter_name]
            undo.close()
            raise
        warn_of_differences(report)
        return report

    def _encoder(self, adapter_name: str) -> nn.Module | None:
        prompts = self._modules.get("prompt_encoder")
        holds = isinstance(prompts, Prompts) and adapter_name in prompts.held()
        return prompts.prompt(adapter_name) if isinstance(prompts, Prompts) and holds else None

    def _warn_of_lost_encoder(self, adapter_name: str, config: AdapterConfig) -> None:
        """P-tuning from a file of PEFT trains on without an encoder, which PEFT does not save."""
        encoder = self._encoder(adapter_name)
        if config.PEFT_TYPE == "P_TUNING" and not isinstance(encoder, PromptEncoder) and not config.inference_mode:
            warnings.warn(
                f"adapter '{adapter_name}': its file has no encoder, so that its virtual tokens train on as they are",
                stacklevel=5,
            )

    def _check_new(self, adapter_name: str, config: AdapterConfig) -> None:
        if type(config) not in METHODS:
            known = ", ".join(kind.__name__ for kind in METHODS)
            raise UserError(
                f"the adapter's configuration is a {type(config).__module__}.{type(config).__name__}; needs "
                f"fastpeft.LoraConfig (LoraConfig.from_dict reads PEFT's keys: from_dict(config.to_dict())) or another "
                f"of {known}"
            )
        taken = hasattr(nn.ModuleDict(), adapter_name) or adapter_name == BASE
        if not _ADAPTER_NAME.fullmatch(adapter_name) or taken:
            raise UserError(
                f"adapter name '{adapter_name}': use letters, digits, '_' and '-' only (it becomes part of parameter "
                "and folder names), and no name of a method of torch.nn.ModuleDict"
            )
        if adapter_name in self.peft_config:
            raise UserError(
                f"adapter name '{adapter_name}' is taken; the model has {', '.join(self.peft_config)}. Choose another, "
                "or delete_adapter first"
            )
        biases = {name: getattr(other, "bias", "none") for name, other in self.peft_config.items()}
        biased = [name for name, bias in biases.items() if bias != "none"]
        bias = getattr(config, "bias", "none")
        if self.peft_config and (biased or bias != "none"):
            raise UserError(
                "biases live in the base model, so only one adapter may train them and it must be the only adapter; "
                f"bias is '{bias}' for '{adapter_name}'"
                + (f" and '{biases[biased[0]]}' for '{biased[0]}'" if biased else "")
            )

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise UserError(f"there is no adapter '{name}'; the model has {', '.join(self.peft_config) or 'none'}")

    @contextmanager
    def _routing(self, adapter_names: Sequence[str | None] | None) -> Iterator[None]:
        """Let each sample of a batch have its own adapter within the block."""
        if adapter_names is None:
            yield
            return
        names = tuple(BASE if name is None else name for name in adapter_names)
        self._check_known([name for name in names if name != BASE])
        if not names:
            raise UserError("adapter_names is empty; give one name for each sample of the batch")
        with ExitStack() as stack:
            stack.enter_context(routed([module for _, module in saving.adapted_modules(self)], names))
            for module in self.modules() if self.training else ():
                if getattr(module, "gradient_checkpointing", False) and _CHECKPOINT in module.__dict__:
                    stack.callback(setattr, module, _CHECKPOINT, module.__dict__[_CHECKPOINT])
                    setattr(module, _CHECKPOINT, partial(_checkpoint_routed, module.__dict__[_CHECKPOINT]))
            yield

    def _sync(self) -> None:
        """Tell every adapted module which adapters are active, and let just these train; merged ones are unmerged."""
        training = {name for name in self.active_adapters if not self.peft_config[name].inference_mode}
        for _, module in saving.adapted_modules(self):
            if isinstance(module, merging.Mergeable) and module.merged_weight is not None:
                module.unmerge()
            module.active_adapters = list(self.active_adapters)
            for name in module.held():
                for parameter in module.trainable(name):
                    if parameter.requires_grad != (name in training):
                        parameter.requires_grad_(name in training)
        for name in training:
            self._train_biases(getattr(self.peft_config[name], "bias", "none"))

    def _train_biases(self, bias: str) -> None:
        if bias == "all":
            for key, parameter in self.get_base_model().named_parameters():
                if key == "bias" or key.endswith(".bias"):
                    parameter.requires_grad_(True)
        elif bias == "lora_only":
            for _, module in saving.adapted_modules(self):
                if isinstance(module, LoRALinear) and module.bias is not None:
                    module.bias.requires_grad_(True)


def warn_of_differences(report: LoadReport) -> None:
    """Say what of a file was left out, where ``strict=False`` let it pass."""
    if not report.complete:
        warnings.warn(f"adapter '{report.path}' was loaded in part:\n{report.differences()}", stacklevel=4)


def _checkpoint_routed(checkpoint: Callable[..., Any], layer: Callable[..., Any], *arguments: Any) -> Any:
    """Checkpoint a layer that has the routing of now when backward runs it again."""
    again = routing_again()

    def run(*arguments: Any) -> Any:
        with again():
            return layer(*arguments)

    return checkpoint(run, *arguments)
