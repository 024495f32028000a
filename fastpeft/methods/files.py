"""Adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's layout.

Keys are PEFT's: the parameter's name in the wrapped model without the adapter's name, for example
``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``. A folder read here is checked against the model as a
whole before one value is copied. PEFT only warns about missing keys and is silent about foreign ones, and either leaves
a model that runs and answers like its base.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastpeft.errors import UserError
from fastpeft.methods.config import LoraConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
_PICKLE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder's content.

    Args:
        path: the folder.
        config: its configuration.
        tensors: its values by PEFT's keys, on the CPU.
    """

    path: Path
    config: LoraConfig
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Args:
        path: the folder that was read.
        loaded: keys whose values are in the model now.
        missing: keys the adapter has and the file lacks; they keep the values they had.
        unexpected: keys of the file that the adapter has no place for.
        mismatched: keys with another shape in the file, then in the model; they keep the values they had.
    """

    path: Path
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @property
    def complete(self) -> bool:
        """Whether file and adapter fit each other exactly."""
        return not (self.missing or self.unexpected or self.mismatched)

    def differences(self) -> str:
        """What does not fit, one line a kind; empty when ``complete``."""
        shapes = [f"{key} is {there} in the file, {here} in the model" for key, there, here in self.mismatched]
        kinds = {
            "missing in the file": self.missing,
            "in the file, but without a place in the model": self.unexpected,
            "of another shape": shapes,
        }
        lines = [f"{kind} ({len(found)}): {_listed(found)}" for kind, found in kinds.items() if found]
        return "\n".join(f"  {line}" for line in lines)


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter folder.

    Args:
        path: the folder that holds the two files.
    Returns:
        Its content; values are finite floating-point numbers.
    Raises:
        UserError: a file is missing, damaged or a pickle; the configuration is not one this version can follow; a
            value is NaN or Inf.
    """
    folder = Path(path)
    config = read_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        if (folder / _PICKLE_NAME).is_file():
            raise UserError(
                f"{folder}: the weights are in {_PICKLE_NAME}, a pickle, which can run code when it is opened, so it "
                "is not read here. If you trust it, convert it once: safetensors.torch.save_file(torch.load("
                f"'{_PICKLE_NAME}', weights_only=True), '{WEIGHTS_NAME}')"
            )
        raise UserError(f"{folder}: no {WEIGHTS_NAME} beside {CONFIG_NAME}; the folder holds {_content(folder)}")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(weights)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{weights}: not a whole safetensors file ({error}); copy or save the adapter again") from error
    _check_values(weights, tensors)
    return AdapterFile(folder, config, tensors)


def read_config(path: str | os.PathLike[str]) -> LoraConfig:
    """Read ``adapter_config.json`` of an adapter folder.

    Args:
        path: the folder.
    Raises:
        UserError: the file is missing or not JSON, or asks for something this version does not do.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = "it is a file; give the folder that holds it" if folder.exists() else "there is no such folder"
        raise UserError(f"adapter '{path}': {found}. An adapter from a hub must be downloaded first")
    file = folder / CONFIG_NAME
    if not file.is_file():
        inside = sorted(entry.parent.name for entry in folder.glob(f"*/{CONFIG_NAME}"))
        if inside:
            advice = f"there are adapters in its subfolders {', '.join(inside)}; give one of these"
        elif (folder / "config.json").is_file():
            advice = (
                "it holds a whole model; give it as the model (model.path; in Python: "
                "AutoModelForCausalLM.from_pretrained)"
            )
        else:
            advice = f"it holds {_content(folder)}"
        raise UserError(f"adapter '{folder}': no {CONFIG_NAME} in this folder; {advice}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy or save the adapter again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds a {type(values).__name__}; needs an object of PEFT's keys")
    if "peft_type" not in values:
        raise UserError(f"{file}: no key 'peft_type'; this is not an adapter's configuration")
    return LoraConfig.from_dict(values, where=str(file))


def write_adapter(path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter folder; each file appears whole or not at all.

    Args:
        path: the folder, made if it is not there.
        config: content of ``adapter_config.json``.
        tensors: values by PEFT's keys, on any device.
    Raises:
        UserError: ``path`` is a file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot save an adapter to '{folder}': it is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    # A copy each, because safetensors refuses tensors that share memory (an output head tied to the embedding).
    stored = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    with _written_whole(folder / WEIGHTS_NAME) as partial:
        safetensors.torch.save_file(stored, partial, metadata={"format": "pt"})
    with _written_whole(folder / CONFIG_NAME) as partial:
        partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_tensors(
    file: AdapterFile, places: Mapping[str, Tensor], optional: Mapping[str, Tensor], strict: bool = True
) -> LoadReport:
    """Copy a file's values into a model's tensors, after everything was found to fit.

    Args:
        file: what ``read_adapter`` returned.
        places: the adapter's tensors in the model by the same keys; written in place.
        optional: further tensors that a file may hold but need not; written in place too.
        strict: refuse anything missing, extra or of another shape, and copy nothing. False copies what fits.
    Returns:
        What was copied and what was not.
    Raises:
        UserError: ``strict`` and something does not fit.
    """
    missing = [key for key in places if key not in file.tensors]
    places = {**optional, **places}
    known = {key: tensor for key, tensor in file.tensors.items() if key in places}
    report = LoadReport(
        path=file.path,
        loaded=[key for key, tensor in known.items() if tensor.shape == places[key].shape],
        missing=missing,
        unexpected=[key for key in file.tensors if key not in places],
        mismatched=[
            (key, tuple(tensor.shape), tuple(places[key].shape))
            for key, tensor in known.items()
            if tensor.shape != places[key].shape
        ],
    )
    if strict and not report.complete:
        advice = _advice(file, report, places)
        raise UserError(f"adapter '{file.path}' does not fit this model:\n{report.differences()}\n  {advice}")
    with torch.no_grad():
        for key in report.loaded:
            places[key].copy_(file.tensors[key])
    return report


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        raise UserError(f"{path}: holds no tensor; save the adapter again")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: '{key}' is {tensor.dtype}; adapter weights are floating-point numbers")
    broken = [key for key, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise UserError(
            f"{path}: {len(broken)} of {len(tensors)} tensors hold NaN or Inf: {_listed(broken)}; the training run "
            "diverged before it was saved, use an earlier checkpoint"
        )


def _advice(file: AdapterFile, report: LoadReport, places: Mapping[str, Tensor]) -> str:
    """How to go on, by the most telling difference."""
    skip = "(In Python: strict=False loads what fits and reports the rest.)"
    foreign = [key for key in report.unexpected if not key.startswith(KEY_PREFIX)]
    if foreign and any(KEY_PREFIX + key in places for key in foreign):
        return (
            f"the file's keys lack the prefix '{KEY_PREFIX}': they were saved from the inner model. Put it before "
            "every key and save the file again with safetensors"
        )
    if foreign and len(foreign) == len(file.tensors):
        return (
            f"no key of the file begins with '{KEY_PREFIX}': another library wrote it. Convert the keys to PEFT's names"
        )
    if any(_without_adapter_name(key) in places for key in report.unexpected):
        return (
            "the file's keys hold an adapter's name ('lora_A.default.weight'): they come from model.state_dict(). "
            "Remove the name from every key, or write the file with save_pretrained"
        )
    if report.mismatched:
        return _shape_advice(file, report.mismatched[0])
    base = file.config.base_model_name_or_path
    made_for = f" It was made for '{base}'." if base else ""
    return f"check that this is the adapter's base model, or save the adapter again.{made_for} {skip}"


def _shape_advice(file: AdapterFile, mismatch: tuple[str, tuple[int, ...], tuple[int, ...]]) -> str:
    key, there, here = mismatch
    rank_axis = 0 if key.endswith(".lora_A.weight") else 1
    if ".lora_" in key and len(there) == 2 and there[1 - rank_axis] == here[1 - rank_axis]:
        return (
            f"the file's rank is {there[rank_axis]} where {CONFIG_NAME} says {here[rank_axis]}: the two files do not "
            "belong together. Correct r and rank_pattern in it, or take both from one save"
        )
    if ".lora_" not in key and there[1:] == here[1:]:
        return (
            f"the vocabulary was resized when the adapter was trained: call model.resize_token_embeddings({there[0]}) "
            "on the base model first"
        )
    base = file.config.base_model_name_or_path
    return "the adapter belongs to a base model of other sizes" + (f": load '{base}'" if base else "; load that one")


def _without_adapter_name(key: str) -> str:
    parts = key.split(".")
    return ".".join(parts[:-2] + parts[-1:])


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of ``path`` only once it is on the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the umask leaves
        yield partial
        partial.chmod(mode)  # safetensors puts a file of its own there, which only its owner may read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"


def _content(folder: Path) -> str:
    return _listed(sorted(entry.name for entry in folder.iterdir()), 8) or "nothing"
