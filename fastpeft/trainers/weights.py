"""A model's weights in a checkpoint folder: the adapter alone where there is one, else the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as transformers_logging

from fastpeft.errors import UserError
from fastpeft.methods import PeftModel


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write what ``from_pretrained`` reads: the adapter in PEFT's layout, or config and weights of a whole model.

    Args:
        model: an adapted model, a transformers model, or any module (its state dict alone is written).
        folder: an existing folder.
    """
    if hasattr(model, "save_pretrained"):
        with _no_progress_bar():
            model.save_pretrained(folder)  # type: ignore[operator]
    else:
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put saved weights into the same model, in place.

    Args:
        model: the model that `save_weights` was given, or one built alike.
        folder: the folder it was given.
    Raises:
        UserError: tensors are missing, unknown, or of another shape.
    """
    if isinstance(model, PeftModel):
        for name in model.peft_config:
            model.load_adapter_weights(folder if name == "default" else folder / name, name)
        return
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: it has no model*.safetensors; it was written for another kind of model")
    state = model.state_dict()
    loaded: set[str] = set()
    for file in files:
        tensors = load_file(file)
        differing = [k for k, t in tensors.items() if k not in state or state[k].shape != t.shape]
        if differing:
            raise UserError(
                f"{file}: {len(differing)} tensors do not fit this model, for example {differing[0]!r}; resume with "
                "the model that the run was started with"
            )
        model.load_state_dict(tensors, strict=False)
        loaded.update(tensors)
    filled = {state[name].data_ptr() for name in loaded}
    missing = [name for name, tensor in state.items() if name not in loaded and tensor.data_ptr() not in filled]
    if missing:  # tied weights are stored once, under one of their names; those are not missing
        raise UserError(
            f"{folder}: it lacks {len(missing)} of the model's tensors, for example {missing[0]!r}; resume with the "
            "model that the run was started with"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for the shards it writes across our progress table."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
