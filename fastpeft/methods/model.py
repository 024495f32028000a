"""PeftModel: a model with adapters, wrapped so that names, files and calls are PEFT's.

The wrapped model sits at ``base_model.model``, hence parameter names such as
``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight``. Whatever the wrapper does not define itself
(``config``, ``device``, ``generate``'s helpers, gradient checkpointing, embeddings) is the wrapped model's, so code
written for a Hugging Face model takes it as one.

Every change is all or nothing: an adapter that cannot be attached or does not fit leaves the model as it was.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods import combine, counting, merging, saving
from fastpeft.methods.config_base import AdapterConfig
from fastpeft.methods.files import LoadReport, file_names, read_adapter, write_adapter
from fastpeft.methods.wrapper import AdapterHost, warn_of_differences
from fastpeft.nn import PromptEncoder


class PeftModel(AdapterHost):
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

    # Adapters.

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
        warn_of_differences(report)
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
                (the sum itself, of the sum of ranks), "magnitude_prune", "ties", "dare_linear", "dare_ties" (A and B
                pruned), or one of these with "_svd" (the whole updates pruned).
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
        from fastpeft.methods.causal_lm import wrapper_class  # which builds on this class

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
            if getattr(self.peft_config[name], "loftq_iterations", 1) > 1:
                warnings.warn(
                    f"save_pretrained: the base of '{name}' was quantised in several turns of LoftQ and is not the one "
                    "that fastpeft.quantize gives; save the base too, or use loftq_iter 1",
                    stacklevel=2,
                )
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
