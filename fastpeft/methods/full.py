"""Full fine-tuning: train a model's own weights, or those whose names are chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods.config_base import AdapterConfig
from fastpeft.methods.targets import matches, near

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass
class FullConfig(AdapterConfig):
    """Training of a dense model's own weights.

    Trained are all p parameters of the modules that are chosen. With bf16 weights a parameter takes 2 bytes, 2 of
    gradient and 8 of AdamW's fp32 state; with fp32 masters 4, 4 and 8. Nothing is added to the model.

    Args:
        train: what to train: names of modules or parameters, each matching a whole name or its last parts, with
            everything in them; or one regular expression for whole parameter names. None trains everything.
        freeze: what not to train, of the above, in the same way.
        master_dtype: "float32" keeps the trained parameters in fp32 whatever the model was loaded in; the model then
            runs under autocast (``bf16: true``). None leaves them as they are.
        task_type: as in LoraConfig.
        base_model_name_or_path: as in LoraConfig.
        revision: as in LoraConfig.
        inference_mode: freeze everything.
    Raises:
        UserError: a value is out of range.
    """

    PEFT_TYPE: ClassVar[str] = "FULL"

    train: list[str] | str | None = None
    freeze: list[str] | str | None = None
    master_dtype: str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self._tidy("train", "freeze")
        self._check_task_type()
        if self.master_dtype not in (None, "float32"):
            raise self._complain(f"master_dtype={self.master_dtype!r}; must be 'float32' or None")
        for name in ("train", "freeze"):
            if isinstance(value := getattr(self, name), str):
                self._check_expression(name, value)
            elif value is not None and not all(isinstance(entry, str) and entry for entry in value):
                raise self._complain(f"{name}={value!r}; must be a list of names")


def train_fully(model: _Model, config: FullConfig) -> _Model:
    """Choose which of a model's own parameters train.

    Args:
        model: a dense model; changed in place.
        config: which.
    Returns:
        The same model.
    Raises:
        UserError: a name matches nothing, nothing is left to train, or a chosen weight is quantised or not loaded; the
            model is left as it was.
    """
    names = [name for name, _ in model.named_parameters()]
    for option in ("train", "freeze"):
        _check_used(option, getattr(config, option), names)
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (config.train is None or _is_meant(config.train, name)) and not _is_meant(config.freeze, name)
    }
    if not chosen:
        raise UserError("FullConfig: freeze leaves nothing of train to train")
    for name, parameter in chosen.items():
        if parameter.is_meta:
            raise UserError(
                f"the weight '{name}' is on the meta device (not loaded, or offloaded); load the model whole"
            )
        if not parameter.is_floating_point():
            raise UserError(
                f"FullConfig: '{name}' is quantised ({parameter.dtype}), and packed weights cannot be trained; load "
                "the model dense, or train an adapter (LoraConfig)"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen and not config.inference_mode)
    if config.master_dtype == "float32":
        for parameter in chosen.values():
            parameter.data = parameter.data.to(torch.float32)
    return model


def _is_meant(patterns: list[str] | str | None, name: str) -> bool:
    """Whether a parameter, or a module around it, is meant."""
    if patterns is None or isinstance(patterns, str):
        return matches(patterns, name)
    parts = name.split(".")
    return any(matches(patterns, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _check_used(option: str, patterns: list[str] | str | None, names: Iterable[str]) -> None:
    names = list(names)
    for entry in [patterns] if isinstance(patterns, str) else patterns or []:
        if not any(_is_meant(patterns if isinstance(patterns, str) else [entry], name) for name in names):
            modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
            raise UserError(
                f"FullConfig: {option}: '{entry}' matches no parameter of the model; {near(entry, modules)}"
            )
