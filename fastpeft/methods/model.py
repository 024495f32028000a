"""PeftModel: a model with adapters, wrapped so that names, files and calls are PEFT's.

The wrapped model sits at ``base_model.model``, hence parameter names such as
``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight``. Whatever the wrapper does not define itself
(``config``, ``device``, ``generate``'s helpers, gradient checkpointing, embeddings) is the wrapped model's, so code
written for a Hugging Face model takes it as one.

Every change is all or nothing: an adapter that cannot be attached or does not fit leaves the model as it was.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods.config import LoraConfig
from fastpeft.methods.files import AdapterFile, LoadReport, load_tensors, read_adapter, write_adapter
from fastpeft.methods.inject import inject_adapter, outer_modules, plan_adapter, replace_module
from fastpeft.methods.modules_to_save import ModulesToSaveWrapper
from fastpeft.nn import LoRALinear, NF4Linear

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]+")
# Settings that decide an adapter's scale; weights trained under one value are wrong under another.
_SCALE_KEYS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


class LoraModel(nn.Module):
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


class PeftModel(nn.Module):
    """A model whose own parameters are frozen and whose adapters train.

    ``get_peft_model`` and ``from_pretrained`` are the usual ways to make one.

    Args:
        model: the model to adapt; its layers are changed in place.
        peft_config: the first adapter.
        adapter_name: its name.
        weights: a saved adapter to fill it with.
        strict: refuse weights that do not fit exactly.
    Attributes:
        peft_config: configuration by adapter name, with ``target_modules`` resolved.
        active_adapters: names of the adapters that a forward pass uses, in order.
    Raises:
        UserError: the adapter cannot be attached or its weights do not fit; the model is left as it was.
    """

    # How transformers' Trainer asks whether a quantised model has something to train.
    _hf_peft_config_loaded = True

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        *,
        weights: AdapterFile | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(model, PeftModel):
            raise UserError(
                "PeftModel: the model has adapters already; use its add_adapter or load_adapter for a further one"
            )
        if any(isinstance(module, (LoRALinear, ModulesToSaveWrapper)) for module in model.modules()):
            raise UserError(
                "PeftModel: the model's layers hold adapters already; go on with the PeftModel that was made from it, "
                "or take them out with its unload()"
            )
        self.peft_config: dict[str, LoraConfig] = {}
        self.active_adapters: list[str] = [adapter_name]
        self.base_model = LoraModel(model)
        self.train(model.training)
        self._attach(adapter_name, peft_config, weights, strict)

    # Calls and attributes of the wrapped model.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model with its active adapters."""
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the wrapped model and its active adapters."""
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

    # Adapters.

    @property
    def active_adapter(self) -> str:
        """The first active adapter."""
        return self.active_adapters[0]

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> None:
        """Add an untrained adapter; ``set_adapter`` makes it active.

        Args:
            adapter_name: a new name of letters, digits, "_" and "-".
            peft_config: what it adapts.
        Raises:
            UserError: the name is taken or unusable, or the configuration does not fit the model.
        """
        self._attach(adapter_name, peft_config)

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        strict: bool = True,
    ) -> LoadReport:
        """Add a saved adapter under a new name; ``set_adapter`` makes it active.

        Args:
            path: the adapter's folder.
            adapter_name: a new name.
            is_trainable: let it train when it is active.
            strict: refuse missing, extra or differently shaped tensors. False loads what fits and warns of the rest.
        Returns:
            What was loaded.
        Raises:
            UserError: the folder cannot be read or does not fit.
        """
        weights = read_adapter(path)
        weights.config.inference_mode = not is_trainable
        report = self._attach(adapter_name, weights.config, weights, strict)
        assert report is not None
        return report

    def load_adapter_weights(
        self, path: str | os.PathLike[str], adapter_name: str = "default", strict: bool = True
    ) -> LoadReport:
        """Overwrite the values of an adapter of this model with saved ones, as resuming a run needs.

        Args:
            path: the adapter's folder.
            adapter_name: the adapter to fill.
            strict: refuse missing, extra or differently shaped tensors. False loads what fits and warns of the rest.
        Returns:
            What was loaded.
        Raises:
            UserError: the folder cannot be read, does not fit, or was trained under another scale; nothing is changed.
        """
        self._check_known([adapter_name])
        weights = read_adapter(path)
        here, there = self.peft_config[adapter_name], weights.config
        differing = [key for key in _SCALE_KEYS if getattr(here, key) != getattr(there, key)]
        if differing:
            values = ", ".join(f"{key} {getattr(there, key)} (here {getattr(here, key)})" for key in differing)
            raise UserError(
                f"adapter '{path}' was trained with {values}; its weights mean something else here. Set the same "
                "values in LoraConfig, or load it with from_pretrained"
            )
        report = self._fill(adapter_name, weights, strict)
        _warn_of_differences(report)
        return report

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the adapters that a forward pass uses; the others stay, frozen.

        Args:
            adapter_name: a name, or several whose updates add up.
            inference_mode: keep the chosen adapters frozen too.
        Raises:
            UserError: there is no adapter of that name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if not names:
            raise UserError("set_adapter: name at least one adapter; disable_adapter() gives the base model")
        self._check_known(names)
        self.active_adapters = names
        for name in names:
            self.peft_config[name].inference_mode = inference_mode
        self._sync()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, the first that is left becomes active.

        Args:
            adapter_name: the adapter to remove.
        Raises:
            UserError: there is no such adapter, or it is the last one (``unload()`` removes that).
        """
        self._check_known([adapter_name])
        if len(self.peft_config) == 1:
            raise UserError(f"delete_adapter: '{adapter_name}' is the last adapter; use unload() to get the base model")
        for _, module in self._adapted_modules():
            module.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        left = [name for name in self.active_adapters if name != adapter_name]
        self.active_adapters = left or [next(iter(self.peft_config))]
        self._sync()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the ``with`` block the model computes what the base model computes.

        Biases trained with ``bias="all"`` or ``"lora_only"`` live in the base and stay changed; a warning says so.
        """
        if any(config.bias != "none" for config in self.peft_config.values()):
            warnings.warn("disable_adapter: the base's biases were trained with the adapter and stay so", stacklevel=3)
        modules = [module for _, module in self._adapted_modules()]
        before = [module.adapters_disabled for module in modules]
        try:
            for module in modules:
                module.adapters_disabled = True
            yield
        finally:
            for module, disabled in zip(modules, before, strict=True):
                module.adapters_disabled = disabled

    # Merging.

    def merge_adapter(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters into one dense weight a layer for faster inference, until ``unmerge_adapter``.

        Args:
            safe_merge: refuse merged weights that hold NaN or Inf, before any layer is changed.
            adapter_names: adapters to merge; None for the active ones.
        Raises:
            UserError: an unknown name, or ``safe_merge`` found a NaN or Inf.
        """
        names = self._names_to_merge(safe_merge, adapter_names)
        for _, module in self._adapted_modules():
            if isinstance(module, LoRALinear):
                module.merge(adapter_names=names)

    def unmerge_adapter(self) -> None:
        """Go back to base and adapters, exactly as they were."""
        for _, module in self._adapted_modules():
            if isinstance(module, LoRALinear):
                module.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Fold adapters into the model for good and give it back without the wrapper.

        Layer by layer, so that memory stays within the model and one layer. A quantised layer becomes a dense one in
        the dtype it was quantised from. An output embedding that was tied to the input embedding and had an adapter
        is a weight of its own afterwards, and the model's configuration says so.

        Args:
            progressbar: ignored; there for calls written for PEFT.
            safe_merge: refuse merged weights that hold NaN or Inf, before any layer is changed.
            adapter_names: adapters to merge; None for the active ones.
        Returns:
            The wrapped model with plain layers, its parameters frozen. This wrapper is of no further use.
        Raises:
            UserError: an unknown name, or ``safe_merge`` found a NaN or Inf.
        """
        return self._strip(self._names_to_merge(safe_merge, adapter_names))

    def unload(self) -> nn.Module:
        """Take all adapters out and give the model back as it was, its parameters frozen.

        Returns:
            The wrapped model. This wrapper is of no further use.
        """
        return self._strip([])

    # Files.

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        strict: bool = True,
    ) -> PeftModel:
        """Wrap a model with a saved adapter, made here or by PEFT.

        An embedding that the file holds replaces the model's: PEFT saves it with the adapter when the vocabulary was
        resized.

        Args:
            model: the base model; its layers are changed in place.
            path: the adapter's folder.
            adapter_name: name to give the adapter.
            is_trainable: let it train; otherwise it comes frozen and the model in evaluation mode.
            strict: refuse missing, extra or differently shaped tensors. False loads what fits and warns of the rest.
        Returns:
            The wrapped model.
        Raises:
            UserError: the folder cannot be read or does not fit; the model is left as it was.
        """
        weights = read_adapter(path)
        weights.config.inference_mode = not is_trainable
        wrapper = _wrapper_class(model)
        wrapped = wrapper(model, weights.config, adapter_name, weights=weights, strict=strict)
        return wrapped if is_trainable else wrapped.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Save adapters in PEFT's layout: "default" in the folder itself, others in subfolders of their name.

        Args:
            save_directory: the folder; made if it is not there.
            selected_adapters: names to save; None for all.
            state_dict: values gathered elsewhere (sharded training), by this model's parameter names.
            is_main_process: write only where this is true, in distributed runs.
        Raises:
            UserError: an unknown name, or ``save_directory`` is a file.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self._check_known(names)
        if not is_main_process:
            return
        base = self.get_base_model()
        made_from = getattr(base, "name_or_path", None) or None
        for name in names:
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            config = self.peft_config[name].to_dict()
            config["inference_mode"] = True
            config["base_model_name_or_path"] = config["base_model_name_or_path"] or made_from
            if config["task_type"] is None:
                made_of = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
                config["auto_mapping"] = made_of
            write_adapter(folder, config, self.adapter_state_dict(name, state_dict))

    def adapter_state_dict(
        self, adapter_name: str = "default", state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors by the keys that its file has.

        Args:
            adapter_name: the adapter.
            state_dict: values to take instead of this model's own, by its parameter names.
        Returns:
            Tensors that share memory with the model's parameters.
        """
        self._check_known([adapter_name])
        state = self._tensors() if state_dict is None else state_dict
        tensors: dict[str, Tensor] = {}
        for name, module in self._adapted_modules():
            full = f"base_model.model.{name}"
            if isinstance(module, LoRALinear):
                if adapter_name in module.lora_A:
                    for part in ("lora_A", "lora_B"):
                        tensors[f"{full}.{part}.weight"] = state[f"{full}.{part}.{adapter_name}.weight"]
            elif adapter_name in module.modules_to_save:
                for key in module.modules_to_save[adapter_name].state_dict():
                    tensors[f"{full}.{key}"] = state[f"{full}.modules_to_save.{adapter_name}.{key}"]
        bias = self.peft_config[adapter_name].bias
        adapted = {f"base_model.model.{name}.base_layer.bias" for name, _ in self._adapted_modules()}
        for key, tensor in state.items():
            if key.endswith(".bias") and (bias == "all" or (bias == "lora_only" and key in adapted)):
                tensors[key.removesuffix(f".{adapter_name}.bias").removesuffix(".bias") + ".bias"] = tensor
        return tensors

    # Counting.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count parameters; a quantised weight counts by the numbers it stands for.

        Returns:
            Those that train, and all.
        """
        trainable = total = 0
        packed = {id(m.weight): m.nf4.numel for m in self.modules() if isinstance(m, NF4Linear)}
        for parameter in self.parameters():
            count = packed.get(id(parameter), parameter.numel())
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print the counts of ``get_nb_trainable_parameters`` and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    # Inside.

    def _attach(
        self, adapter_name: str, config: LoraConfig, weights: AdapterFile | None = None, strict: bool = True
    ) -> LoadReport | None:
        """Plan, inject and fill one adapter, or leave everything as it was."""
        self._check_new(adapter_name, config)
        plan = plan_adapter(self.get_base_model(), config, every_name=weights is None)
        first = not self.peft_config
        undo = inject_adapter(self.get_base_model(), plan, adapter_name)
        try:
            self.peft_config[adapter_name] = plan.config
            if first:
                self.get_base_model().requires_grad_(False)
            self._sync()
            if weights is None:
                return None
            report = self._fill(adapter_name, weights, strict)
        except BaseException:
            del self.peft_config[adapter_name]
            undo.close()
            raise
        _warn_of_differences(report)
        return report

    def _fill(self, adapter_name: str, weights: AdapterFile, strict: bool) -> LoadReport:
        """Load an adapter's values; embeddings may come with them."""
        state = self._tensors()
        base = self.get_base_model()
        getters = (getattr(base, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
        embeddings = [getter() for getter in getters if callable(getter)]
        prefixes = tuple(
            f"base_model.model.{name}."
            for name, module in outer_modules(base)
            if any(module is embedding for embedding in embeddings)
        )
        optional = {key: t for key, t in state.items() if key.startswith(prefixes) and ".lora_" not in key}
        report = load_tensors(weights, self.adapter_state_dict(adapter_name, state), optional, strict)
        self.unmerge_adapter()  # what was merged held the old values
        return report

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as ``state_dict`` has them, but without unpacking quantised layers."""
        named = [
            *self.named_parameters(remove_duplicate=False),
            *self.named_buffers(remove_duplicate=False),
        ]
        return {name: tensor.detach() for name, tensor in named}

    def _check_new(self, adapter_name: str, config: LoraConfig) -> None:
        if not isinstance(config, LoraConfig):
            raise UserError(
                f"the adapter's configuration is a {type(config).__module__}.{type(config).__name__}; needs "
                "fastpeft.LoraConfig (LoraConfig.from_dict reads PEFT's keys: from_dict(config.to_dict()))"
            )
        if not _ADAPTER_NAME.fullmatch(adapter_name) or hasattr(nn.ModuleDict(), adapter_name):
            raise UserError(
                f"adapter name '{adapter_name}': use letters, digits, '_' and '-' only (it becomes part of parameter "
                "and folder names), and no name of a method of torch.nn.ModuleDict"
            )
        if adapter_name in self.peft_config:
            raise UserError(
                f"adapter name '{adapter_name}' is taken; the model has {', '.join(self.peft_config)}. Choose another, "
                "or delete_adapter first"
            )
        biased = [name for name, other in self.peft_config.items() if other.bias != "none"]
        if self.peft_config and (biased or config.bias != "none"):
            raise UserError(
                "biases live in the base model, so only one adapter may train them and it must be the only adapter; "
                f"bias is '{config.bias}' for '{adapter_name}'"
                + (f" and '{self.peft_config[biased[0]].bias}' for '{biased[0]}'" if biased else "")
            )

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise UserError(f"there is no adapter '{name}'; the model has {', '.join(self.peft_config) or 'none'}")

    def _adapted_modules(self) -> Iterator[tuple[str, LoRALinear | ModulesToSaveWrapper]]:
        for name, module in outer_modules(self.get_base_model()):
            if isinstance(module, (LoRALinear, ModulesToSaveWrapper)):
                yield name, module

    def _sync(self) -> None:
        """Tell every adapted module which adapters are active, and let just these train; merged ones are unmerged."""
        training = {name for name in self.active_adapters if not self.peft_config[name].inference_mode}
        for _, module in self._adapted_modules():
            module.active_adapters = list(self.active_adapters)
            if isinstance(module, LoRALinear):
                module.unmerge()
                parts = [*module.lora_A.items(), *module.lora_B.items()]
            else:
                parts = list(module.modules_to_save.items())
            for name, part in parts:
                part.requires_grad_(name in training)
        for name in training:
            self._train_biases(self.peft_config[name].bias)

    def _train_biases(self, bias: str) -> None:
        if bias == "all":
            for key, parameter in self.get_base_model().named_parameters():
                if key == "bias" or key.endswith(".bias"):
                    parameter.requires_grad_(True)
        elif bias == "lora_only":
            for _, module in self._adapted_modules():
                if isinstance(module, LoRALinear) and module.bias is not None:
                    module.bias.requires_grad_(True)

    def _names_to_merge(self, safe_merge: bool, adapter_names: Sequence[str] | None) -> list[str]:
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._check_known(names)
        if safe_merge:
            for module_name, module in self._adapted_modules():
                if isinstance(module, LoRALinear) and not module.merged_dense_weight(names).isfinite().all():
                    raise UserError(
                        f"merge: the merged weight of '{module_name}' holds NaN or Inf; the adapter is broken or "
                        f"overflows the layer's dtype. No layer was changed"
                    )
        return names

    def _strip(self, names: Sequence[str]) -> nn.Module:
        """Put plain layers back, with the named adapters in them."""
        base = self.get_base_model()
        for name in [name for name, _ in self._adapted_modules()]:  # names only, so that each old weight can go
            replace_module(base, name, _plain(base.get_submodule(name), names))
        base.requires_grad_(False)
        _note_untied_embeddings(base)
        self.peft_config.clear()
        return base


class PeftModelForCausalLM(PeftModel):
    """A PeftModel over a language model, with the arguments that tools read off its signature.

    transformers' Trainer decides by the names of ``forward``'s parameters which columns of a data set to pass on and
    which of them are labels.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the wrapped model with its active adapters; arguments are the wrapped model's.

        Args:
            input_ids: ``(batch, t)`` tokens.
            attention_mask: ``(batch, t)``, 0 at padding.
            position_ids: ``(batch, t)``.
            inputs_embeds: ``(batch, t, hidden)`` instead of ``input_ids``.
            labels: ``(batch, t)``, -100 where there is no target.
            kwargs: further arguments of the wrapped model.
        """
        given = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        return self.get_base_model()(
            input_ids=input_ids, **{name: value for name, value in given.items() if value is not None}, **kwargs
        )


def get_peft_model(model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """Freeze a model and add a trainable adapter to it.

    Args:
        model: a Hugging Face model or any module with linear layers, dense or quantised; changed in place.
        peft_config: which layers to adapt, and how.
        adapter_name: the adapter's name.
    Returns:
        The wrapped model; its adapter is fp32 and on each layer's device.
    Raises:
        UserError: the configuration does not fit the model; the model is left as it was.
    """
    return _wrapper_class(model)(model, peft_config, adapter_name)


def _wrapper_class(model: nn.Module) -> type[PeftModel]:
    arguments = inspect.signature(model.forward).parameters
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return PeftModelForCausalLM if {"input_ids", "labels"} <= set(arguments) and not encoder_decoder else PeftModel


def _plain(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """What stands in an adapted module's place once the named adapters are part of the model."""
    if isinstance(module, LoRALinear):
        return module.to_dense(names) if any(name in module.lora_A for name in names) else module.base_layer
    assert isinstance(module, ModulesToSaveWrapper)
    copies = [module.modules_to_save[name] for name in names if name in module.modules_to_save]
    return copies[0] if copies else module.original_module


def _warn_of_differences(report: LoadReport) -> None:
    if not report.complete:
        warnings.warn(f"adapter '{report.path}' was loaded in part:\n{report.differences()}", stacklevel=4)


def _note_untied_embeddings(model: nn.Module) -> None:
    """Clear ``tie_word_embeddings`` where merging gave the output embedding a weight of its own."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and torch.is_tensor(head.weight) and head.weight is not embedding.weight:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
