"""From a ``model`` section to a model in memory: `source` finds it, transformers reads it, complaints get its name."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fastpeft.errors import UserError
from fastpeft.models import NF4Config, load_pretrained
from fastpeft.ops import build_info
from fastpeft.recipes.schema import ModelConfig
from fastpeft.recipes.source import find_source, gguf_path

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


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
    source, files = find_source(config)
    folder = Path(source)
    if config.gguf_file is None and folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        # Some versions of transformers make an empty tokenizer then instead of complaining.
        raise UserError(
            f"model.path {config.path}: no tokenizer in {folder}: copy its files "
            "(tokenizer.json or tokenizer_config.json, and what lies beside them) from where the model came from"
        )
    with _complaints_name(config, source, "its tokenizer"), quiet():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **files)
    if config.chat_template is not None:
        tokenizer.chat_template = None if config.chat_template == "none" else config.chat_template
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
    source, files = find_source(config)
    with _complaints_name(config, source, "its configuration"), quiet():
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
    model = read_weights(config, model_config, device)
    # Not before: a model built with a pad token never trains that token's embedding, and it may be EOS.
    for told in (model.config, model.generation_config):
        if told is not None:
            told.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval()


def read_weights(
    config: ModelConfig, model_config: transformers.PretrainedConfig, device: torch.device | None
) -> PreTrainedModel:
    """Load a base model on the CPU as its files have it, and quantise it where the section says so.

    Args:
        config: the ``model`` section. A checkpoint that is packed already stays so, whatever ``quantize`` says.
        model_config: what ``read_config`` gave.
        device: where the model will be used, which decides the dtype where "auto" leaves a choice; None for files.
    Returns:
        The model on the CPU, in evaluation mode.
    Raises:
        UserError: the weights cannot be read, do not fit the configuration, or hold NaN or Inf.
    """
    source, files = find_source(config)
    packing = None
    if config.quantize == "nf4":
        packing = NF4Config(config.skip_modules, block_size=config.block_size, double_quant=config.double_quant)
    with _complaints_name(config, source, "its weights"), quiet():
        return load_pretrained(
            source,
            config=model_config,
            dtype=weights_dtype(config, model_config, device),
            quantization_config=packing,
            **files,
        )


def weights_dtype(
    config: ModelConfig, model_config: transformers.PretrainedConfig, device: torch.device | None
) -> torch.dtype | str:
    """The dtype to load a base model in; "auto" where only the weights themselves can tell.

    Args:
        config: the ``model`` section.
        model_config: what ``read_config`` gave.
        device: where the model will be used; None where it is only written again, as the checkpoint has it.
    """
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    if config.gguf_file is not None or model_config.dtype == torch.bfloat16:
        return torch.bfloat16 if device is None or computes_in_bfloat16(device) else torch.float32
    return model_config.dtype or "auto"


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
def _complaints_name(config: ModelConfig, source: str, part: str) -> Iterator[None]:
    """Turn a library's complaint about files into a UserError that names the model, or its GGUF file."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _complaint(config, source, part, error) from error
    except Exception as error:
        # A GGUF reader walks over raw bytes and raises whatever a wrong one leads to: struct.error, RuntimeError, ...
        if config.gguf_file is None:
            raise
        raise _complaint(config, source, part, error) from error


def _complaint(config: ModelConfig, source: str, part: str, error: Exception) -> UserError:
    reason = _reason(error)
    if config.gguf_file is None:
        return UserError(f"model.path {config.path}: {part} cannot be read: {reason}")
    file = gguf_path(source, config.gguf_file)
    if file is not None and not _is_whole_gguf(file):
        return UserError(f"{file} is truncated or no GGUF file; download it again ({reason})")
    return UserError(f"model.gguf_file {file or config.gguf_file}: {part} cannot be read: {reason}")


def _reason(error: Exception) -> str:
    """The first line of an error; all of it where that line only announces what follows."""
    text = str(error).strip()
    first = text.partition("\n")[0].strip()
    return " ".join(text.split()) if first.endswith(":") else first or type(error).__name__


def _is_whole_gguf(file: Path) -> bool:
    """Whether the package gguf can walk over the file; asked once reading has failed, since it takes seconds."""
    from gguf import GGUFReader

    try:
        GGUFReader(file)
    except Exception:  # its errors are of every kind too
        return False
    return True


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are at least as fast as float32 there; on a CPU oneDNN knows."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
