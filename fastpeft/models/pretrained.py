"""``load_pretrained``: transformers' ``from_pretrained`` for every file that fastpeft reads, and strict.

Three sources: a dense checkpoint, packed while it is read if ``NF4Config`` is given; a bitsandbytes NF4 checkpoint,
read without bitsandbytes; a GGUF file, which transformers unpacks whole and which is then packed layer by layer.
transformers fills weights that a checkpoint lacks with random numbers and warns; here that is an error, as are weights
without a place in the model, of another shape, or not finite.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel

from fastpeft.errors import UserError
from fastpeft.models.nf4_config import NF4Config, from_bitsandbytes, is_bitsandbytes
from fastpeft.models.quantize import quantize

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MOST_LISTED = 8
# Keywords of from_pretrained that say where the configuration lies.
_CONFIG_KEYS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "trust_remote_code",
)


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    quantization_config: NF4Config | None = None,
    gguf_file: str | None = None,
    strict: bool = True,
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a Hugging Face model: dense, packed while loading, packed by bitsandbytes, or from GGUF.

    Args:
        path: a folder or a hub id.
        quantization_config: pack the linear layers and experts. A checkpoint that is packed already stays as it is.
        gguf_file: name of a GGUF file in it.
        strict: refuse a checkpoint with missing, extra or differently shaped weights. False warns of them: what is
            missing or of another shape gets random numbers.
        auto_class: what loads it, such as ``AutoModelForSequenceClassification``.
        kwargs: further keywords of ``from_pretrained`` (``dtype``, ``device_map``, ``config``, ...).
    Returns:
        The model, in evaluation mode.
    Raises:
        UserError: the weights are pickled, packed in a way that fastpeft does not read, do not fit the model, or hold
            NaN or Inf.
    """
    _refuse_pickles(path, gguf_file)
    config = kwargs.pop("config", None)
    if config is None:
        source = {"gguf_file": gguf_file} if gguf_file is not None else {}
        passed = {key: value for key, value in kwargs.items() if key in _CONFIG_KEYS}
        config = AutoConfig.from_pretrained(path, **source, **passed)
    config = copy.deepcopy(config)  # the section that packs it may be exchanged
    if gguf_file is not None:
        kwargs |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        stored = stored_quantization(config, str(path))
        if stored is not None:
            if quantization_config is not None:
                warnings.warn(f"{path} is packed already; it is taken as it is, without NF4Config", stacklevel=2)
            config.quantization_config = stored
        elif quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        kwargs["use_safetensors"] = True
    model, found = auto_class.from_pretrained(
        path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    _check_fit(str(path), found, strict)
    _check_finite(str(path), model)
    if gguf_file is not None and quantization_config is not None:
        packing = quantization_config
        quantize(
            model, block_size=packing.block_size, double_quant=packing.double_quant, skip=packing.skip_modules
        ).config.quantization_config.compute_dtype = packing.compute_dtype or model.dtype
    return model  # type: ignore[no-any-return]


def stored_quantization(config: transformers.PretrainedConfig, where: str) -> dict[str, Any] | None:
    """The section by which fastpeft's quantiser reads a packed checkpoint; None for a dense one.

    Args:
        config: the checkpoint's configuration.
        where: what to call the checkpoint in a complaint.
    Raises:
        UserError: it is packed in a way that fastpeft does not read.
    """
    section = getattr(config, "quantization_config", None)
    if section is None:
        return None
    section = section if isinstance(section, Mapping) else section.to_dict()
    if is_bitsandbytes(section):
        return from_bitsandbytes(section, where)
    raise UserError(
        f"{where}: it is packed by {section.get('quant_method', 'an unnamed method')!r}; fastpeft reads bitsandbytes' "
        "4-bit NF4 only. Load the model that it was made from, in bfloat16, and pack that (fastpeft quantize)"
    )


def _refuse_pickles(path: str | os.PathLike[str], gguf_file: str | None) -> None:
    folder = Path(path)
    if gguf_file is not None or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: its weights are pickled ({_listed(pickles, 3)}), which can run code when they are read, so "
            "they are not; convert them to model.safetensors"
        )


def _check_fit(path: str, found: Mapping[str, Any], strict: bool) -> None:
    shapes = [f"{key} is {tuple(there)} in the file, {tuple(here)} in the model" for key, there, here in _shapes(found)]
    kinds = {
        "missing in the checkpoint": sorted(found.get("missing_keys", ())),
        "in the checkpoint, but without a place in the model": sorted(found.get("unexpected_keys", ())),
        "of another shape": shapes,
        "unreadable": [str(error) for error in found.get("error_msgs", ())],
    }
    lines = [f"  {kind} ({len(names)}): {_listed(names)}" for kind, names in kinds.items() if names]
    if not lines:
        return
    text = f"{path}: the weights do not fit the model that config.json describes:\n" + "\n".join(lines)
    if strict:
        raise UserError(
            f"{text}\n  Check that config.json belongs to these weights, or copy the checkpoint again. (In Python: "
            "strict=False loads what fits and gives the rest random numbers.)"
        )
    warnings.warn(f"{text}\n  What is missing or of another shape was given random numbers", stacklevel=3)


def _shapes(found: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return sorted(found.get("mismatched_keys", ()), key=lambda entry: str(entry[0]))


def _check_finite(path: str, model: PreTrainedModel) -> None:
    """Refuse weights that are not finite; packed ones were looked at when they were read."""
    broken = [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all()
    ]
    if broken:
        raise UserError(
            f"{path}: {len(broken)} weights hold NaN or Inf: {_listed(broken)}; the run that made them diverged, or "
            "the file is damaged. Use an earlier checkpoint, or copy it again"
        )


def _listed(names: Iterable[str], most: int = _MOST_LISTED) -> str:
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f", and {more} more" if more > 0 else "")
