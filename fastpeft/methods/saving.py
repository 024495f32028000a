"""An adapter's tensors under the keys of its file, and back into a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods.bottleneck import ATTENTION_SITE, OUTPUT_SITE
from fastpeft.methods.files import KEY_PREFIX, AdapterFile, LoadReport, compare
from fastpeft.methods.targets import outer_modules
from fastpeft.nn import Adapted, AdaptedLinear, BottleneckSite, LoRALinear, Prompts

# AdapterHub's keys hold the name that the adapter had when it was saved.
_SITE_NAME = re.compile(rf"((?:{ATTENTION_SITE}|{OUTPUT_SITE})\.adapters)\.[^.]+\.")


def adapted_modules(wrapper: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Modules of a wrapped model that hold adapters, one inside another too.

    Args:
        wrapper: a PeftModel.
    Yields:
        Full name in the wrapper, and module.
    """
    for name, module in wrapper.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def tensors_of(wrapper: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, as ``state_dict`` has them, but without unpacking quantised layers."""
    named = [*wrapper.named_parameters(remove_duplicate=False), *wrapper.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def key_prefix(name: str, module: Adapted) -> str:
    """What stands before the last part of a key in an adapter's file.

    Args:
        name: of the module in the wrapper.
        module: the module.
    """
    if isinstance(module, Prompts):
        return ""
    if isinstance(module, BottleneckSite):
        return f"{name.removeprefix(KEY_PREFIX)}."
    return f"{name.replace('.base_layer', '')}."


def file_tensors(wrapper: nn.Module, adapter_name: str, config: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by the keys that its file has.

    Args:
        wrapper: a PeftModel.
        adapter_name: the adapter.
        config: its configuration.
        state: values by the wrapper's names.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in adapted_modules(wrapper):
        if adapter_name in module.held():
            prefix = key_prefix(name, module)
            values = module.saved(adapter_name, lambda local, name=name: state[f"{name}.{local}"])  # type: ignore[misc]
            tensors.update({prefix + tail: tensor for tail, tensor in values.items()})
    for key, name in _bias_names(wrapper, adapter_name, config, state):
        tensors[key] = state[name]
    return tensors


def encoder_tensors(wrapper: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What P-tuning goes on from, by its names in the encoder; empty for other adapters."""
    prompts = wrapper._modules.get("prompt_encoder")
    if not isinstance(prompts, Prompts) or adapter_name not in prompts.held():
        return {}
    return prompts.encoder(adapter_name, lambda local: state[f"prompt_encoder.{local}"])


def fill(wrapper: nn.Module, adapter_name: str, config: Any, file: AdapterFile, strict: bool) -> LoadReport:
    """Load an adapter's values, after everything was found to fit; embeddings may come with them.

    Args:
        wrapper: a PeftModel that holds the adapter.
        adapter_name: the adapter.
        config: its configuration.
        file: what to load.
        strict: refuse anything missing, extra or of another shape, and copy nothing. False copies what fits.
    Returns:
        What was copied and what was not.
    Raises:
        UserError: ``strict`` and something does not fit; the encoder's file and the virtual tokens do not agree.
    """
    state = tensors_of(wrapper)
    holders = [(key_prefix(name, m), m) for name, m in adapted_modules(wrapper) if adapter_name in m.held()]
    tensors = {_SITE_NAME.sub(rf"\1.{adapter_name}.", key): tensor for key, tensor in file.tensors.items()}
    for prefix, module in holders:
        tails = {key[len(prefix) :]: key for key in tensors if key.startswith(prefix)}
        whole = module.as_saved(adapter_name, {tail: tensors[key] for tail, key in tails.items()})
        tensors.update({tails[tail]: tensor for tail, tensor in whole.items()})
    file = dataclasses.replace(file, tensors=tensors)

    biases = dict(_bias_names(wrapper, adapter_name, config, state))
    places = {p + tail: shape for p, m in holders for tail, shape in m.saved_shapes(adapter_name).items()}
    places.update({key: tuple(state[name].shape) for key, name in biases.items()})
    optional = _embeddings(wrapper, state)
    report = compare(file, places, {key: tuple(tensor.shape) for key, tensor in optional.items()}, strict)
    fitting = {key: tensors[key] for key in report.loaded}
    _check_shared(holders, adapter_name, fitting)
    encoders = [m for _, m in holders if isinstance(m, Prompts) and file.encoder]
    for prompts in encoders:
        prompts.check_encoder(adapter_name, file.encoder, tensors.get("prompt_embeddings"), str(file.path))

    with torch.no_grad():
        for key, tensor in fitting.items():
            if key in optional and key not in places:
                optional[key].copy_(tensor)
            elif key in biases:
                state[biases[key]].copy_(tensor)
    for prefix, module in holders:
        values = {tail: t for key, t in fitting.items() if (tail := key.removeprefix(prefix)) != key or not prefix}
        module.load(adapter_name, file.encoder if module in encoders else values)
    return report


def _bias_names(
    wrapper: nn.Module, adapter_name: str, config: Any, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, str]]:
    """Keys in the file, and names here, of the base's biases that are trained with an adapter."""
    bias = getattr(config, "bias", "none")
    if bias == "none":
        return
    adapted = {f"{n}.base_layer.bias" for n, m in adapted_modules(wrapper) if isinstance(m, AdaptedLinear)}
    for name in state:
        if name.endswith(".bias") and (bias == "all" or name in adapted):
            yield name.removesuffix(f".{adapter_name}.bias").removesuffix(".bias") + ".bias", name


def _embeddings(wrapper: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings of the base, which a file may hold: PEFT saves them when the vocabulary was resized."""
    base: Any = wrapper.get_base_model()  # type: ignore[operator]
    getters = (getattr(base, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    found = [getter() for getter in getters if callable(getter)]
    prefixes = tuple(
        f"{KEY_PREFIX}{name}." for name, module in outer_modules(base) if any(module is each for each in found)
    )
    return {key: t for key, t in state.items() if prefixes and key.startswith(prefixes) and ".lora_" not in key}


def _check_shared(holders: list[tuple[str, Adapted]], adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse files whose layers have an A of their own where one is shared here."""
    first: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in holders:
        key = f"{prefix}lora_A.weight"
        if isinstance(module, LoRALinear) and key in tensors:
            other, tensor = first.setdefault(id(module.lora_A[adapter_name]), (key, tensors[key]))
            if not torch.equal(tensor, tensors[key]):
                raise UserError(
                    f"shared_a: '{other}' and '{key}' differ in the file, and this adapter trains one A for both; "
                    "load it without shared_a"
                )
