"""Models for other programs: packed, with an adapter merged in, or the adapter alone; the result of a run or of files.

    dense     safetensors in the base's dtype, nothing packed: what every program reads
    nf4       a bitsandbytes 4-bit checkpoint
    adapter   adapter_config.json and its weights, as PEFT reads them

An adapter is merged into the base that it was trained on: over a packed base into the values that the codes stand for,
so that the merged model answers like the trained one. The original dense base can be asked for instead; it is nearer
to what that base was, and not what the adapter saw.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from fastpeft.errors import UserError
from fastpeft.methods import (
    AdapterConfig,
    BottleneckAdapterConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from fastpeft.methods.files import read_adapter
from fastpeft.models import dequantize, quantize
from fastpeft.models.choose import choose_layers, weight_names, weights_of
from fastpeft.models.pretrained import stored_quantization
from fastpeft.ops import nf4_dequantize, nf4_quantize
from fastpeft.recipes.load import load_tokenizer, model_skeleton, quiet, read_config, read_weights, weights_dtype
from fastpeft.recipes.paths import ADAPTER_CONFIGS
from fastpeft.recipes.schema import ModelConfig
from fastpeft.recipes.source import find_source
from fastpeft.recipes.whole_folder import check_target, written_whole

Form = Literal["dense", "nf4", "adapter"]

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*.tiktoken"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*"),
)
_ADAPTER_FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "fastpeft*.json", "fastpeft*.safetensors"),
    *("adapter.safetensors", "prompt_encoder.safetensors"),  # bottlenecks; what P-tuning goes on from
)
_UNMERGEABLE: dict[type[AdapterConfig], str] = {
    PromptTuningConfig: "virtual tokens",
    PromptEncoderConfig: "virtual tokens",
    BottleneckAdapterConfig: "bottleneck adapters with an activation",
}


@dataclass(frozen=True)
class Export:
    """What is to be written.

    Args:
        command: for whom, which begins a complaint.
        out: the folder.
        form: what it will hold.
        base: the base model, as it is held in memory for merging; for "nf4" its settings of packing are used too.
        adapter: the adapter's folder, or None.
        max_shard_size: largest weight file, such as "5GB".
        overwrite: replace a model or an adapter that is there.
    """

    command: str
    out: Path
    form: Form
    base: ModelConfig
    adapter: Path | None = None
    max_shard_size: str = "5GB"
    overwrite: bool = False


def run_export(export: Export, dry_run: bool = False) -> Iterator[str]:
    """Write the folder; with ``dry_run`` check everything that can be without the weights, and write nothing.

    Args:
        export: what.
        dry_run: only say what would be written.
    Returns:
        Lines that say what happens, as it happens.
    Raises:
        UserError: an input is missing or broken, or the folder must not be written; nothing is changed then.
    """
    source = None if export.form == "adapter" else find_source(export.base)[0]
    inputs = [export.adapter, Path(source) if source is not None else None]
    check_target(export.out, export.command, overwrite=export.overwrite, inputs=inputs)
    if export.adapter is not None:
        with quiet():
            kind = type(read_adapter(export.adapter).config)
        if export.form != "adapter" and kind in _UNMERGEABLE:
            raise UserError(
                f"{export.command}: {export.adapter} is {_UNMERGEABLE[kind]}, which no weight can express; use the "
                "adapter beside its base (fastpeft export RUN OUT --to adapter)"
            )
    if export.form == "adapter":
        yield from _export_adapter(export, dry_run)
        return
    size = yield from _describe(export)
    if dry_run:
        yield "nothing was written (--dry-run)"
        return
    _check_space(export, size)
    model = _load(export)
    if export.form == "nf4" and export.adapter is not None:
        yield f"packing adds a relative error of {_packing_error(model, export.base):.2%} to the merged weights"
    if export.form == "nf4":
        base = export.base
        quantize(model, block_size=base.block_size, double_quant=base.double_quant, skip=base.skip_modules)
    with written_whole(export.out) as partial, quiet():
        model.save_pretrained(partial, max_shard_size=export.max_shard_size)
        _put_tokenizer(export, partial)
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    yield f"written: {export.out} ({_gigabytes(written)})"


def _load(export: Export) -> PreTrainedModel:
    """The model to save, with the adapter merged: dense, or packed where that is what was asked for."""
    packs_now = export.form == "nf4" and export.adapter is None
    base = replace(export.base, quantize="nf4") if packs_now else export.base
    model = read_weights(base, read_config(base), device=None)
    if packs_now:  # while it was read; a checkpoint that was packed already keeps its codes
        return model
    if export.adapter is not None:
        merged = PeftModel.from_pretrained(model, export.adapter).merge_and_unload(safe_merge=True)
        assert isinstance(merged, PreTrainedModel)
        model = merged
    return dequantize(model).to(model.dtype)


def _packing_error(model: nn.Module, base: ModelConfig) -> float:
    """Norm of what packing changes over the norm of all weights that are packed."""
    error = total = 0.0
    for layer in choose_layers(model, base.skip_modules, base.block_size).values():
        for weight in weights_of(layer).values():
            packed = nf4_quantize(weight, base.block_size, base.double_quant)
            error += float((nf4_dequantize(packed, torch.float32) - weight.float()).square().sum())
            total += float(weight.float().square().sum())
    return (error / total) ** 0.5 if total else 0.0


def _describe(export: Export) -> Generator[str, None, int]:
    """Say what will be written, from the configuration alone; returns its bytes."""
    model_config = read_config(export.base)
    source, _ = find_source(export.base)
    packed_already = stored_quantization(model_config, f"model {export.base.path}") is not None
    skeleton = model_skeleton(model_config)
    dtype = weights_dtype(export.base, model_config, device=None)
    width = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
    sizes = {name: weight.numel() for name, weight in skeleton.named_parameters() if name not in tied}
    count = sum(sizes.values())
    dense = count * width
    held = " in 4 bits" if packed_already or (export.base.quantize == "nf4" and export.adapter is not None) else ""
    yield f"base:    {source}{held}, {count:,} weights"
    if export.adapter is not None:
        yield f"adapter: {export.adapter}"
    if export.form == "dense":
        yield f"writes:  {export.out}: dense safetensors, {_gigabytes(dense)}"
        return dense
    layers = choose_layers(skeleton, export.base.skip_modules, export.base.block_size)
    per_weight = 0.5 + ((1 + 4 / 256) if export.base.double_quant else 4) / export.base.block_size
    inside = sum(sizes[name] for name in weight_names(layers))
    size = round((count - inside) * width + inside * per_weight)
    yield (
        f"writes:  {export.out}: bitsandbytes 4-bit, {len(layers)} layers packed, {_gigabytes(size)} "
        f"(dense: {_gigabytes(dense)})"
    )
    return size


def _export_adapter(export: Export, dry_run: bool) -> Iterator[str]:
    if export.adapter is None:
        raise UserError(f"{export.command}: there is no adapter to export: the run trained all weights; export 'dense'")
    files = [file for pattern in (*_ADAPTER_FILES, *_TOKENIZER_FILES) for file in sorted(export.adapter.glob(pattern))]
    size = sum(file.stat().st_size for file in files)
    yield f"writes:  {export.out}: the adapter of {export.adapter}, {_gigabytes(size)}"
    if dry_run:
        yield "nothing was written (--dry-run)"
        return
    with written_whole(export.out) as partial:
        _copy(export.adapter, partial, (*_ADAPTER_FILES, *_TOKENIZER_FILES))
    yield f"written: {export.out} ({_gigabytes(size)})"


def _put_tokenizer(export: Export, partial: Path) -> None:
    """The tokenizer that the adapter was trained with, else the base's; files are copied as they are."""
    if export.base.chat_template is not None:  # the model has learnt another layout than its base's files say
        load_tokenizer(export.base).save_pretrained(partial)
        return
    source, files = find_source(export.base)
    folders = [export.adapter] if export.adapter is not None else []
    folders += [Path(source)] if export.base.gguf_file is None and Path(source).is_dir() else []
    for folder in folders:
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
            _copy(folder, partial, _TOKENIZER_FILES)
            return
    if export.base.gguf_file is not None or not Path(source).is_dir():
        AutoTokenizer.from_pretrained(source, **files).save_pretrained(partial)


def _copy(folder: Path, into: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in folder.glob(pattern):
            target = into / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _check_space(export: Export, size: int) -> None:
    parent = next(path for path in export.out.expanduser().absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise UserError(
            f"{export.command}: {export.out} needs {_gigabytes(size)}, and {parent} has {_gigabytes(free)} free"
        )


def base_of_adapter(adapter: Path, command: str) -> str:
    """The base model that an adapter's configuration names.

    Args:
        adapter: the adapter's folder.
        command: for whom, which begins a complaint.
    Raises:
        UserError: it cannot be read, or names none.
    """
    files = [adapter / name for name in ADAPTER_CONFIGS]
    file = next((file for file in files if file.is_file()), files[0])
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{command}: {adapter} is not an adapter folder: {file.name}: {error}") from error
    if not name:
        raise UserError(f"{command}: {file} names no base model; give it with --model")
    return str(name)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
