"""PeftModel: a model with adapters, wrapped so that names, files and calls are PEFT's.

The wrapped model sits at ``base_model.model``, hence parameter names such as
``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight``. Whatever the wrapper does not define itself
(``config``, ``device``, ``generate``'s helpers, gradient checkpointing, embeddings) is the wrapped model's, so code
written for a Hugging Face model takes it as one.

Every change is all or nothing: an adapter that cannot be attached or does not fit leaves the model as it was.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods import combine, counting, merging, saving
from fastpeft.methods.config_base import AdapterConfig
from fastpeft.methods.files import AdapterFile, LoadReport, file_names, read_adapter, write_adapter
from fastpeft.methods.inject import METHODS, inject_adapter, plan_adapter
from fastpeft.nn import Adapted, LoRALinear, PromptEncoder, Prompts
from fastpeft.nn.adapted import BASE

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]+")
# Layers recomputed in backward know nothing of the routing of their forward pass.
_RECOMPUTES = ("gradient_checkpointing", "_fastpeft_checkpointing")


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


class PeftModel(nn.Module):
    """A model whose own parameters are frozen and whose adapters train.

    ``get_peft_model`` and ``PeftModel.from_pretrained`` are the usual ways to make one. Adapters of any kinds may stand
    in one model, and several may be active at once (a stack): low-rank terms and bottlenecks add up, (IA)^3 vectors
    multiply, virtual tokens stand one after the other.

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
        if isinstance(model, PeftModel):
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

    # Adapters.

    @property
    def active_adapter(self) -> str:
        """The first active adapter."""
        return self.active_adapters[0]

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens that the active adapters put before every text; they count in length limits."""
        configs = (self.peft_config[name] for name in self.active_adapters if name in self.peft_config)
        return sum(getattr(config, "num_virtual_tokens", 0) for config in configs)

    def add_adapter(self, adapter_name: str, peft_config: AdapterConfig) -> None:
        """Add an untrained adapter of any kind; ``set_adapter`` makes it active.

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
            UserError: the folder cannot be read, does not fit, or was trained under other settings; nothing is changed.
        """
        self._check_known([adapter_name])
        weights = read_adapter(path)
        here, there = self.peft_config[adapter_name], weights.config
        if type(here) is not type(there):
            raise UserError(
                f"adapter '{path}' is of kind {there.PEFT_TYPE} and '{adapter_name}' of kind {here.PEFT_TYPE}; load it "
                "under another name with load_adapter"
            )
        differing = [key for key in here.MEANING if getattr(here, key) != getattr(there, key)]
        if differing:
            values = ", ".join(f"{key} {getattr(there, key)} (here {getattr(here, key)})" for key in differing)
            raise UserError(
                f"adapter '{path}' was trained with {values}; its weights mean something else here. Set the same "
                f"values in {type(here).__name__}, or load it with from_pretrained"
            )
        if isinstance(self._encoder(adapter_name), PromptEncoder) and not weights.encoder:
            raise UserError(
                f"adapter '{path}' holds virtual tokens without the encoder that made them, so that this adapter's "
                "cannot go on from there; load it with load_adapter, or from a checkpoint of fastpeft"
            )
        report = saving.fill(self, adapter_name, here, weights, strict)
        self.unmerge_adapter()  # what was merged held the old values
        _warn_of_differences(report)
        return report

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the adapters that a forward pass uses; the others stay, frozen.

        Args:
            adapter_name: a name, or several, of any kinds, which act together.
            inference_mode: keep the chosen adapters frozen too.
        Raises:
            UserError: there is no adapter of that name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if not names:
            raise UserError("set_adapter: name at least one adapter; disable_adapter() gives the base model")
        self._check_known(names)
        self.active_adapters = list(dict.fromkeys(names))
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
        for _, module in saving.adapted_modules(self):
            module.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        left = [name for name in self.active_adapters if name != adapter_name]
        self.active_adapters = left or [next(iter(self.peft_config))]
        self._sync()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a weighted combination of others; ``set_adapter`` makes it active.

        Args:
            adapters: names of LoRA adapters, or of (IA)^3 adapters ("linear" only).
            weights: a factor for each; negative ones subtract.
            adapter_name: a new name.
            combination_type: "svd" (the best approximation of the sum), "linear" (A and B each; all of one rank), "cat"
                (the sum itself, of the sum of ranks), "ties", "dare_linear", "dare_ties" (A and B pruned), or one of
                these with "_svd" (the whole updates pruned).
            svd_rank: rank of an SVD's result; None for the greatest of the adapters'.
            density: share of values that pruning keeps.
            majority_sign_method: "total" or "frequency", how "ties" elects signs.
        Raises:
            UserError: adapters of different or other kinds, or an option that does not fit.
        Source:
            TIES, arXiv 2306.01708; DARE, arXiv 2311.03099; names and arithmetic are PEFT's.
        """
        self._check_known(adapters)
        options = combine.Options(combination_type, svd_rank, density, majority_sign_method)
        config = combine.plan({name: self.peft_config[name] for name in adapters}, weights, options)
        self._attach(adapter_name, config)
        try:
            combine.fill(self, adapter_name, dict(zip(adapters, weights, strict=True)), options)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the ``with`` block the model computes what the base model computes.

        Biases trained with ``bias="all"`` or ``"lora_only"`` live in the base and stay changed; a warning says so.
        """
        if any(getattr(config, "bias", "none") != "none" for config in self.peft_config.values()):
            warnings.warn("disable_adapter: the base's biases were trained with the adapter and stay so", stacklevel=3)
        modules = [module for _, module in saving.adapted_modules(self)]
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

        Virtual tokens and bottleneck adapters, which no weight can express, go on beside it.

        Args:
            safe_merge: refuse merged weights that hold NaN or Inf, before any layer is changed.
            adapter_names: adapters to merge; None for the active ones.
        Raises:
            UserError: an unknown name, or ``safe_merge`` found a NaN or Inf.
        """
        names = self._names_to_merge(safe_merge, adapter_names)
        for _, module in merging.mergeable(self.get_base_model()):
            module.merge(adapter_names=names)

    def unmerge_adapter(self) -> None:
        """Go back to base and adapters, exactly as they were."""
        for _, module in merging.mergeable(self.get_base_model()):
            module.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        requantize: bool = False,
    ) -> nn.Module:
        """Fold adapters into the model for good and give it back without the wrapper.

        Layer by layer, so that memory stays within the model and one layer. A quantised layer becomes a dense one in
        the dtype it was quantised from. An output embedding that was tied to the input embedding and had an adapter
        is a weight of its own afterwards, and the model's configuration says so.

        Args:
            progressbar: ignored; there for calls written for PEFT.
            safe_merge: refuse merged weights that hold NaN or Inf, before any layer is changed.
            adapter_names: adapters to merge; None for the active ones.
            requantize: quantise layers that were NF4 again; a warning is logged with the error that this adds.
        Returns:
            The wrapped model with plain layers, its parameters frozen. This wrapper is of no further use.
        Raises:
            UserError: an unknown name, one that no weight can express, or ``safe_merge`` found a NaN or Inf.
        """
        names = self._names_to_merge(safe_merge, adapter_names)
        merging.check_mergeable(self, names)
        return self._strip(names, requantize)

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
        from fastpeft.methods.causal_lm import wrapper_class

        weights = read_adapter(path)
        weights.config.inference_mode = not is_trainable
        wrapped = wrapper_class(model)(model, weights.config, adapter_name, weights=weights, strict=strict)
        return wrapped if is_trainable else wrapped.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Save adapters in PEFT's layout: "default" in the folder itself, others in subfolders of their name.

        Bottleneck adapters, which PEFT does not have, are saved in files of our own (`fastpeft.methods.files`).

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
        state = saving.tensors_of(self) if state_dict is None else {**saving.tensors_of(self), **state_dict}
        for name in names:
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            config = self.peft_config[name]
            values = config.to_dict()
            values["inference_mode"] = True
            values["base_model_name_or_path"] = (
                values["base_model_name_or_path"] or getattr(base, "name_or_path", None) or None
            )
            if values["task_type"] is None:
                made_of = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
                values["auto_mapping"] = made_of
            write_adapter(
                folder,
                values,
                saving.file_tensors(self, name, config, state),
                file_names(config),
                config.own_dict(),
                saving.encoder_tensors(self, name, state),
            )

    def adapter_state_dict(
        self, adapter_name: str = "default", state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors by the keys that its file has.

        Args:
            adapter_name: the adapter.
            state_dict: values to take instead of this model's own, by its parameter names.
        Returns:
            Tensors that share memory with the model's parameters, where they are these.
        """
        self._check_known([adapter_name])
        state = saving.tensors_of(self) if state_dict is None else state_dict
        return saving.file_tensors(self, adapter_name, self.peft_config[adapter_name], state)

    # Counting.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count parameters; a quantised weight counts by the numbers it stands for.

        Returns:
            Those that train, and all.
        """
        return counting.count(self)

    def print_trainable_parameters(self, per_layer: bool = False) -> None:
        """Print the counts of ``get_nb_trainable_parameters`` and their ratio.

        Args:
            per_layer: before it, a line for each module that trains something.
        """
        if per_layer:
            print(counting.table(self))
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

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
        _warn_of_differences(report)
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
        if self.training and any(getattr(m, flag, False) for m in self.modules() for flag in _RECOMPUTES):
            raise UserError(
                "adapter_names in training cannot go with gradient checkpointing, which runs layers again without it; "
                "switch one of them off"
            )
        modules = [module for _, module in saving.adapted_modules(self)]
        try:
            for module in modules:
                module.routing = names
            yield
        finally:
            for module in modules:
                module.routing = None

    def _sync(self) -> None:
        """Tell every adapted module which adapters are active, and let just these train; merged ones are unmerged."""
        training = {name for name in self.active_adapters if not self.peft_config[name].inference_mode}
        self.unmerge_adapter()
        for _, module in saving.adapted_modules(self):
            module.active_adapters = list(self.active_adapters)
            for name in module.held():
                for parameter in module.trainable(name):
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

    def _names_to_merge(self, safe_merge: bool, adapter_names: Sequence[str] | None) -> list[str]:
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._check_known(names)
        if safe_merge:
            merging.check_finite(self.get_base_model(), names)
        return names

    def _strip(self, names: Sequence[str], requantize: bool = False) -> nn.Module:
        base = merging.strip(self, self.get_base_model(), names, requantize)
        self.peft_config.clear()
        return base


def _warn_of_differences(report: LoadReport) -> None:
    if not report.complete:
        warnings.warn(f"adapter '{report.path}' was loaded in part:\n{report.differences()}", stacklevel=4)
