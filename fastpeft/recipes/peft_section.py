"""The section ``peft``: which method, and the fields of that method's own configuration.

    {method: lora, r: 16}        the fields of LoraConfig          {method: adapter, adapter_type: houlsby}
    {method: qlora, r: 16}       the same, over model.quantize nf4 {method: full, freeze: [embed_tokens]}
    {method: p_tuning, num_virtual_tokens: 20}                     {method: none}      all weights

A key of another method is said to be that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from fastpeft.errors import UserError
from fastpeft.methods import (
    AdapterConfig,
    BottleneckAdapterConfig,
    FullConfig,
    IA3Config,
    LoraConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from fastpeft.recipes.fields import hints_of
from fastpeft.recipes.sections import MethodName, ModelConfig, PeftSection
from fastpeft.recipes.yaml_file import Settings

METHODS: dict[str, type[AdapterConfig]] = {
    "lora": LoraConfig,
    "qlora": LoraConfig,
    "ia3": IA3Config,
    "prompt_tuning": PromptTuningConfig,
    "p_tuning": PromptEncoderConfig,
    "adapter": BottleneckAdapterConfig,
    "full": FullConfig,
}


def method_of(settings: Settings) -> str:
    """The method that the settings name, known or not; "lora" where they name none."""
    section = settings.values.get("peft")
    given = section.get("method", "lora") if isinstance(section, dict) else "lora"
    return given if isinstance(given, str) else "lora"


def peft_table(settings: Settings, *, from_adapter: bool) -> dict[str, Any]:
    """Keys that the section takes, with their types: those of the method that it names.

    Args:
        settings: the run's.
        from_adapter: whether this kind of run can go on from an adapter.
    """
    own = hints_of(PeftSection)
    shared = {"method": own["method"], **({"adapter": own["adapter"]} if from_adapter else {})}
    method = method_of(settings)
    if method == "none":
        return {**shared, **hints_of(LoraConfig)}  # so that switching an adapter off is one override
    if method in METHODS:
        return {**shared, **hints_of(METHODS[method])}
    every = {key: Any for config in METHODS.values() for key in hints_of(config)}
    return {**every, **shared}  # the method is what has to be mended first


def key_of_another_method(key: str) -> str:
    """Whose key it is, as the end of a message; nothing if no method has it."""
    homes = [name for name, config in METHODS.items() if name != "qlora" and key in hints_of(config)]
    return f"; it belongs to method {' or '.join(homes)}" if homes else ""


def read_peft(settings: Settings, values: Mapping[str, Any], model: ModelConfig) -> tuple[PeftSection, ModelConfig]:
    """Make the section of values that have their types.

    Args:
        settings: where they came from.
        values: of the section ``peft``.
        model: the base model.
    Returns:
        The section, and the base model as the method holds it: qlora packs it.
    Raises:
        UserError: a value is out of range, or the method does not go with the model.
    """
    given = dict(values)
    method: MethodName = given.pop("method", "lora")
    adapter = given.pop("adapter", None)
    where = settings.origin("peft", "method")
    if adapter is not None:
        if given or method != "lora":
            key = next(iter(given), "method")
            raise UserError(
                f"{settings.origin('peft', key)}: peft.{key} does not go with peft.adapter, whose own settings stay; "
                "leave one of them out"
            )
        return PeftSection("lora", None, adapter), model
    if method == "qlora":
        written = settings.values.get("model") or {}
        if written.get("quantize", "nf4") != "nf4":
            raise UserError(
                f"{where}: peft.method qlora is lora over a packed model, and model.quantize is "
                f"{written['quantize']} ({settings.origin('model', 'quantize')}); leave model.quantize out, or use "
                "peft.method lora"
            )
        method, model = "lora", _packed(model)
    config = _config(settings, METHODS.get(method, LoraConfig), given)
    trains_all = method == "none" or (isinstance(config, FullConfig) and config.train is None)
    if trains_all and model.quantize != "none":
        raise UserError(
            f"{where}: peft.method {method} trains all weights, and model.quantize {model.quantize} freezes them; "
            "use peft.method lora or model.quantize none"
        )
    return PeftSection(method, None if method == "none" else config), model


def _packed(model: ModelConfig) -> ModelConfig:
    return ModelConfig(**{**vars(model), "quantize": "nf4"})


def _config(settings: Settings, config_class: type[AdapterConfig], values: dict[str, Any]) -> AdapterConfig:
    try:
        return config_class(**values)
    except UserError as error:
        message = re.sub(rf"^{config_class.__name__}:\s*", "", str(error))  # what follows begins with the key
        key = re.split(r"\W", message, maxsplit=1)[0]
        raise UserError(f"{settings.origin('peft', key)}: peft.{message}") from error


assert set(get_args(MethodName)) == {*METHODS, "none"}
