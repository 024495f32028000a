"""Log-probabilities of a reference on disk, under a name that says for which data and which weights they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastpeft.data import PreferenceDataset
from fastpeft.methods import PeftModel

_FORMAT = "1"  # of the log-probabilities; another number makes old files be passed over


def fingerprint(dataset: PreferenceDataset, model: nn.Module, adapter: str | None) -> str:
    """A name for the log-probabilities of a data set under a model: SHA-256 over its tokens and the weights.

    Args:
        dataset: the data.
        model: the reference, or the model that is it without its adapters or with one of them.
        adapter: that one adapter.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    for tokens in dataset.tokens():
        digest.update(len(tokens).to_bytes(8, "little"))
        digest.update(tokens.tobytes())
    others: set[int] = set()
    if isinstance(model, PeftModel):
        own = set() if adapter is None else set(map(Tensor.data_ptr, model.adapter_state_dict(adapter).values()))
        for name in model.peft_config:
            others |= set(map(Tensor.data_ptr, model.adapter_state_dict(name).values())) - own
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.data_ptr() not in others:
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:32]


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def read_logps(path: Path, dataset: PreferenceDataset) -> list[float] | None:
    """The log-probabilities of a file; None if there is none, or it is broken or of another length."""
    try:
        logps: list[float] = load_file(path)["logps"].tolist()
    except (OSError, SafetensorError, KeyError):
        return None
    return logps if len(logps) == sum(dataset.completion_counts) else None


def write_logps(path: Path, logps: Sequence[float]) -> None:
    """Write them beside and rename, so that a file of this name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({"logps": torch.tensor(logps)}, partial)
    os.replace(partial, path)
