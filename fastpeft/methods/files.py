"""Adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's layout.

Beside them lie, where they are needed, ``fastpeft.json`` (settings that PEFT does not know) and
``prompt_encoder.safetensors`` (what P-tuning goes on from). Bottleneck adapters, which PEFT does not have, are
``fastpeft_adapter.json`` and ``adapter.safetensors`` with AdapterHub's names of weights.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fastpeft.errors import UserError
from fastpeft.methods.bottleneck import BottleneckAdapterConfig
from fastpeft.methods.config_base import AdapterConfig
from fastpeft.methods.ia3 import IA3Config
from fastpeft.methods.lora_config import LoraConfig
from fastpeft.methods.prompts import PromptEncoderConfig, PromptTuningConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OWN_NAME = "fastpeft.json"
ENCODER_NAME = "prompt_encoder.safetensors"
BOTTLENECK_NAMES = ("fastpeft_adapter.json", "adapter.safetensors")
KEY_PREFIX = "base_model.model."
_PICKLE_NAME = "adapter_model.bin"
_CONFIGS: dict[str, type[AdapterConfig]] = {
    config.PEFT_TYPE: config
    for config in (LoraConfig, IA3Config, PromptTuningConfig, PromptEncoderConfig, BottleneckAdapterConfig)
}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder's content.

    Args:
        path: the folder.
        config: its configuration.
        tensors: its values by the keys of its file, on the CPU.
        encoder: an encoder of virtual tokens, by its names; empty where there is none.
        holds_start: the tensors hold what a PiSSA or OLoRA adapter began with.
    """

    path: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    encoder: dict[str, Tensor] = field(default_factory=dict)
    holds_start: bool = False


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
    config_name, weights_name = file_names(config)
    weights = folder / weights_name
    if not weights.is_file():
        if (folder / _PICKLE_NAME).is_file():
            raise UserError(
                f"{folder}: the weights are in {_PICKLE_NAME}, a pickle, which can run code when it is opened, so it "
                "is not read here. If you trust it, convert it once: safetensors.torch.save_file(torch.load("
                f"'{_PICKLE_NAME}', weights_only=True), '{weights_name}')"
            )
        raise UserError(f"{folder}: no {weights_name} beside {config_name}; the folder holds {_content(folder)}")
    encoder = folder / ENCODER_NAME
    return AdapterFile(
        folder,
        config,
        read_tensors(weights),
        read_tensors(encoder) if config.PEFT_TYPE == PromptEncoderConfig.PEFT_TYPE and encoder.is_file() else {},
        holds_start="init_lora_weights" in _read_own(folder),
    )


def file_names(config: AdapterConfig) -> tuple[str, str]:
    """Names of the two files of an adapter: configuration and weights."""
    return BOTTLENECK_NAMES if isinstance(config, BottleneckAdapterConfig) else (CONFIG_NAME, WEIGHTS_NAME)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of an adapter.

    Args:
        path: the file.
    Raises:
        UserError: it is damaged or empty, or a value is no finite floating-point number.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or save the adapter again") from error
    _check_values(path, tensors)
    return tensors


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy or save the adapter again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds a {type(values).__name__}; needs an object of PEFT's keys")
    return values


def _read_own(folder: Path) -> dict[str, Any]:
    own = folder / OWN_NAME
    return _read_json(own) if own.is_file() else {}


def read_config(path: str | os.PathLike[str]) -> AdapterConfig:
    """Read the configuration of an adapter folder.

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
    if not file.is_file() and (folder / BOTTLENECK_NAMES[0]).is_file():
        file = folder / BOTTLENECK_NAMES[0]
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
    values = _read_json(file)
    if "peft_type" not in values:
        raise UserError(f"{file}: no key 'peft_type'; this is not an adapter's configuration")
    kind = str(values["peft_type"]).upper()
    if kind not in _CONFIGS:
        raise UserError(f"{file}: peft_type is '{values['peft_type']}'; this version has {', '.join(_CONFIGS)}")
    return _CONFIGS[kind].from_dict({**values, **_read_own(folder)}, where=str(file))


def write_adapter(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    names: tuple[str, str] = (CONFIG_NAME, WEIGHTS_NAME),
    own: Mapping[str, Any] | None = None,
    encoder: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter folder; each file appears whole or not at all.

    Args:
        path: the folder, made if it is not there.
        config: content of ``adapter_config.json``.
        tensors: values by PEFT's keys, on any device.
        names: of the two files.
        own: settings that PEFT does not know.
        encoder: an encoder of virtual tokens.
    Raises:
        UserError: ``path`` is a file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot save an adapter to '{folder}': it is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / names[1], tensors)
    for name, wanted in ((OWN_NAME, own), (ENCODER_NAME, encoder)):
        if not wanted:
            (folder / name).unlink(missing_ok=True)  # of an adapter that was here before
    if encoder:
        _write_tensors(folder / ENCODER_NAME, encoder)
    if own:
        _write_json(folder / OWN_NAME, own)
    _write_json(folder / names[0], config)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # A copy each, because safetensors refuses tensors that share memory (an output head tied to the embedding).
    stored = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    with _written_whole(path) as partial:
        safetensors.torch.save_file(stored, partial, metadata={"format": "pt"})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with _written_whole(path) as partial:
        partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def compare(
    file: AdapterFile,
    places: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    strict: bool = True,
) -> LoadReport:
    """Find out what of a file fits a model's tensors.

    Args:
        file: what ``read_adapter`` returned.
        places: shapes of the adapter's tensors in the model by the same keys.
        optional: those of further tensors that a file may hold but need not.
        strict: refuse anything missing, extra or of another shape.
    Returns:
        What can be copied and what cannot.
    Raises:
        UserError: ``strict`` and something does not fit.
    """
    missing = [key for key in places if key not in file.tensors]
    places = {**optional, **places}
    known = {key: tuple(tensor.shape) for key, tensor in file.tensors.items() if key in places}
    report = LoadReport(
        path=file.path,
        loaded=[key for key, shape in known.items() if shape == places[key]],
        missing=missing,
        unexpected=[key for key in file.tensors if key not in places],
        mismatched=[(key, shape, places[key]) for key, shape in known.items() if shape != places[key]],
    )
    if strict and not report.complete:
        advice = _advice(file, report, places)
        raise UserError(f"adapter '{file.path}' does not fit this model:\n{report.differences()}\n  {advice}")
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


def _advice(file: AdapterFile, report: LoadReport, places: Mapping[str, tuple[int, ...]]) -> str:
    """How to go on, by the most telling difference."""
    skip = "(In Python: strict=False loads what fits and reports the rest.)"
    foreign = [key for key in report.unexpected if not key.startswith(KEY_PREFIX)]
    if foreign and any(KEY_PREFIX + key in places for key in foreign):
        return (
            f"the file's keys lack the prefix '{KEY_PREFIX}': they were saved from the inner model. Put it before "
            "every key and save the file again with safetensors"
        )
    if foreign and len(foreign) == len(file.tensors) and any(key.startswith(KEY_PREFIX) for key in report.missing):
        return (
            f"no key of the file begins with '{KEY_PREFIX}': another library wrote it. Convert the keys to PEFT's names"
        )
    if any(name in places for key in report.unexpected for name in _without_adapter_name(key)):
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
    if key == "prompt_embeddings" and there[1:] == here[1:]:
        return (
            f"the file has {there[0]} virtual tokens where {CONFIG_NAME} says {here[0]}: the two files do not belong "
            "together. Correct num_virtual_tokens, or take both from one save"
        )
    if ".lora_" not in key and there[1:] == here[1:] and key.startswith(KEY_PREFIX) and key.endswith(".weight"):
        return (
            f"the vocabulary was resized when the adapter was trained: call model.resize_token_embeddings({there[0]}) "
            "on the base model first"
        )
    base = file.config.base_model_name_or_path
    return "the adapter belongs to a base model of other sizes" + (f": load '{base}'" if base else "; load that one")


def _without_adapter_name(key: str) -> tuple[str, str]:
    """The key without its last part but one, or its last."""
    parts = key.split(".")
    return ".".join(parts[:-2] + parts[-1:]), ".".join(parts[:-1])


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
