"""``fastpeft estimate``: a run's YAML, or a model and a method on the command line, as a page about memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PretrainedConfig

from fastpeft.errors import UserError, did_you_mean
from fastpeft.methods import (
    AdapterConfig,
    BottleneckAdapterConfig,
    FullConfig,
    IA3Config,
    LoraConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from fastpeft.recipes.estimate import Estimate, Mode, Setting, estimate
from fastpeft.recipes.estimate_fit import method_table, nearest_fit, usable
from fastpeft.recipes.estimate_model import ModelShape, shape_of, shape_of_size
from fastpeft.recipes.load import read_config, weights_dtype
from fastpeft.recipes.run_folder import CONFIG_FILE
from fastpeft.recipes.schema import ModelConfig, RunConfig, load_config

METHODS = ("full", "lora", "qlora", "ia3", "prompt_tuning", "p_tuning", "adapter")
MODES: tuple[Mode, ...] = ("none", "selective", "full", "offload")
_OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
_ROWS = {"reward": 2, "dpo": 2}  # of a pair
_GPU = torch.device("cuda")


def setting_of(run: RunConfig) -> tuple[ModelShape, Setting]:
    """What a run's configuration says about memory; only the model's ``config.json`` is opened.

    Args:
        run: what ``load_config`` read.
    Raises:
        UserError: the model's configuration cannot be read, or the kind of run has no formula.
    """
    if run.kind == "ppo":
        raise UserError(
            "estimate: there is no formula for ppo, whose answers are as long as they turn out; estimate the same "
            "model under dpo, whose step holds two rows of data.max_length"
        )
    if run.peft.adapter is not None:
        raise UserError(
            "estimate: peft.adapter goes on from an adapter; give its settings (peft.r and so on) in its place to "
            "estimate the run"
        )
    config, args = _model_config(run.model), run.train.args
    given = (value for value in vars(run.peft).values() if isinstance(value, AdapterConfig))
    method = next(given, FullConfig())  # a section without a configuration trains all weights
    weights = _itemsize(weights_dtype(run.model, config, _GPU))
    fused = run.model.accelerates(_GPU)
    return shape_of(config, run.model.path), Setting(
        method,
        quantize=run.model.quantize == "nf4",
        block_size=run.model.block_size,
        double_quant=run.model.double_quant,
        skip_modules=tuple(run.model.skip_modules),
        itemsize=2 if args.bf16 or args.fp16 else weights,
        weight_itemsize=weights,
        optimizer=str(args.optimizer),
        optim_budget=_bytes(args.optim_device_budget_gb),
        batch=args.per_device_train_batch_size * _ROWS.get(run.kind, 1),
        length=run.data.max_length,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=_mode(run),
        activation_budget=_bytes(run.model.activation_budget_gb),
        fused=fused,
    )


def _model_config(model: ModelConfig) -> PretrainedConfig:
    """The model's configuration; a folder needs no weights yet."""
    if model.gguf_file is None and (Path(model.path) / "config.json").is_file():
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(model.path)
        except (OSError, ValueError) as error:
            raise UserError(f"estimate: {model.path}/config.json cannot be read: {error}") from error
        return config
    return read_config(model)


def _mode(run: RunConfig) -> Mode:
    if run.model.checkpointing is not None:
        return run.model.checkpointing
    if run.model.activation_budget_gb is not None:
        return "selective"
    return "full" if run.train.args.gradient_checkpointing else "none"


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _itemsize(dtype: torch.dtype | str) -> int:
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 2


def setting_of_options(
    model: str | None,
    params: str | None,
    method: str,
    *,
    rank: int = 16,
    batch: int = 1,
    length: int = 2048,
    checkpointing: str = "full",
    optimizer: str = "adamw",
) -> tuple[ModelShape, Setting]:
    """A model and how to train it, as options of the command line say; bfloat16 throughout.

    Args:
        model: folder, hub id or ``package:NAME``.
        params: instead, a number of parameters.
        method: one of ``METHODS``.
        rank: of LoRA.
        batch: rows of a step.
        length: tokens of a row.
        checkpointing: what layers keep.
        optimizer: whose state is counted.
    Raises:
        UserError: an unknown name, or neither or both of model and params.
    """
    for option, value, known in (
        ("--method", method, METHODS),
        ("--checkpointing", checkpointing, MODES),
        ("--optimizer", optimizer, _OPTIMIZERS),
    ):
        if value not in known:
            raise UserError(
                f"estimate: {option} {value}; it must be one of {', '.join(known)}{did_you_mean(value, known)}"
            )
    if (model is None) == (params is None):
        raise UserError("estimate: give a run's YAML, or one of --model (folder, hub id) and --params (such as 8B)")
    if params is not None:
        shape = shape_of_size(params)
    else:
        assert model is not None
        shape = shape_of(_model_config(ModelConfig(model)), model)
    chosen = {
        "full": FullConfig(),
        "ia3": IA3Config(),
        "prompt_tuning": PromptTuningConfig(),
        "p_tuning": PromptEncoderConfig(),
        "adapter": BottleneckAdapterConfig("houlsby"),
    }.get(method, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    mode: Any = checkpointing
    return shape, Setting(
        chosen,
        quantize=method == "qlora",
        optimizer=optimizer,
        batch=batch,
        length=length,
        checkpointing=mode,
        fused=shape.fused,
    )


def report(shape: ModelShape, setting: Setting, gpu_bytes: int | None = None, measured: int | None = None) -> str:
    """The page: what takes what, other kinds of checkpointing, other methods, and whether it fits.

    Args:
        shape: the model.
        setting: how it is trained.
        gpu_bytes: the GPU's memory; None where it is not known.
        measured: the peak of a run of this setting.
    Raises:
        UserError: the method does not fit the model.
    """
    found = estimate(shape, setting)
    lines = [
        f"model      {shape.name}: {shape.parameters / 1e9:.3f} B parameters, {shape.layers} layers",
        f"trained    {found.trained.numbers:,} ({100 * found.trained.numbers / shape.parameters:.3f}%)",
        f"a step     {setting.batch} rows of at most {setting.length} tokens, checkpointing {setting.checkpointing}, "
        f"{setting.optimizer}",
        "",
        *_parts(setting, found),
        "",
    ]
    if not shape.fused and setting.fused:
        lines += ["the layers of this family are not known to be fused; where they are not, activations take more", ""]
    if measured is not None:
        lines += [f"measured   {_gb(measured)} in that run; predicted {100 * found.total / measured - 100:+.1f}%", ""]
    lines += ["checkpointing      device      host"]
    for mode in MODES:
        other = estimate(
            shape, dataclasses.replace(setting, checkpointing=mode, activation_budget=_budget(setting, mode))
        )
        lines.append(
            f"  {mode:12} {_gb(other.total):>12} {_gb(other.activations_host) if mode == 'offload' else '':>9}"
        )
    lines += ["", *_methods(shape, setting, gpu_bytes)]
    if gpu_bytes is not None:
        lines += ["", *_fits(shape, setting, found, gpu_bytes)]
    return "\n".join(lines)


def _budget(setting: Setting, mode: Mode) -> int | None:
    return setting.activation_budget if mode == "selective" else None


def _parts(setting: Setting, found: Estimate) -> list[str]:
    rows = [
        ("weights, dense", found.weights.dense, 0),
        ("weights, NF4 codes", found.weights.codes, 0),
        ("weights, NF4 scales", found.weights.scales, 0),
        ("adapter", found.adapters, 0),
        ("gradients", found.gradients, 0),
        (f"optimizer, {setting.optimizer}", found.optimizer, found.optimizer_host),
        ("activations kept for backward", found.activations, found.activations_host),
        ("backward of one layer", found.layer, 0),
        ("head and loss", found.loss, 0),
        ("workspace of products", found.workspace, 0),
    ]
    lines = [
        f"  {name:32} {_gb(device):>9}" + (f"   and {_gb(host)} of host memory" if host else "")
        for name, device, host in rows
        if device or host
    ]
    return [*lines, f"  {'the most at once':32} {_gb(found.total):>9}   in {found.when}"]


def _methods(shape: ModelShape, setting: Setting, gpu_bytes: int | None) -> list[str]:
    lines = [
        "method            trained   weights   adapter, gradients, optimizer      total"
        + ("  fits" if gpu_bytes else "")
    ]
    for name, (_, found) in method_table(shape, setting).items():
        state = found.adapters + found.gradients + found.optimizer
        fits = "" if gpu_bytes is None else "   yes" if found.total <= usable(gpu_bytes) else "    no"
        lines.append(
            f"  {name:13} {found.trained.numbers / 1e6:8.2f}M {_gb(found.weights.total):>9} {_gb(state):>30} "
            f"{_gb(found.total):>10}{fits}"
        )
    return lines


def _fits(shape: ModelShape, setting: Setting, found: Estimate, gpu_bytes: int) -> list[str]:
    room = usable(gpu_bytes)
    what = f"{_gb(room)} of the GPU's {_gb(gpu_bytes)}"
    if found.total <= room:
        return [f"it fits: {_gb(found.total)} into {what}"]
    lines = [f"it does not fit: {_gb(found.total)} into {what}"]
    near = nearest_fit(shape, setting, gpu_bytes)
    if near is None:
        return [*lines, "no setting tried here fits: take a smaller model, or a GPU with more memory"]
    return [*lines, f"this does, with {_gb(near.estimate.total)}: {' '.join(near.changes)}"]


def as_json(shape: ModelShape, setting: Setting, gpu_bytes: int | None = None) -> str:
    """The same for programs: bytes by part, the total, and whether it fits."""
    found = estimate(shape, setting)
    values = dataclasses.asdict(found) | {"total": found.total, "when": found.when, "parameters": shape.parameters}
    if gpu_bytes is not None:
        values["fits"] = found.total <= usable(gpu_bytes)
    return json.dumps(values, indent=2)


def gpu_memory(stated_gb: float | None) -> int | None:
    """Bytes of the GPU that was stated, or of the one that is there."""
    if stated_gb is not None:
        if not 0 < stated_gb < 1e5:
            raise UserError(f"estimate: --gpu-gb {stated_gb}; it must be a number of gigabytes above 0")
        return int(stated_gb * 1e9)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def measured_peak(config: Path) -> int | None:
    """The largest ``memory_bytes`` of a run, given its folder or ``config.yaml``; None where there is none."""
    config = _settings_file(config)
    metrics = config.parent / "metrics.jsonl"
    if config.name != CONFIG_FILE or not metrics.is_file():
        return None
    found = [json.loads(line).get("memory_bytes") for line in metrics.read_text(encoding="utf-8").splitlines() if line]
    return max((int(value) for value in found if value), default=None)


def predicted_and_measured(
    run: RunConfig, largest_batch: tuple[int, int] | None, measured: int
) -> tuple[int, str] | None:
    """What the formulas say of a run that is over, and a line with what its training steps took.

    Args:
        run: the run's configuration.
        largest_batch: rows and tokens of the largest batch it had, virtual tokens not included; None counts what the
            configuration allows.
        measured: bytes of the peak.
    Returns:
        Bytes, and the line; None for a run without a formula.
    """
    try:
        shape, setting = setting_of(run)
        if largest_batch is not None:
            rows, tokens = largest_batch
            setting = dataclasses.replace(setting, batch=rows, length=tokens + run.peft.virtual_tokens)
        predicted = estimate(shape, setting).total
    except UserError:
        return None
    change = 100 * measured / predicted - 100
    return predicted, (
        f"memory: predicted {_gb(predicted)}, measured {_gb(measured)} ({change:+.1f}%), for {setting.batch} rows of "
        f"{setting.length} tokens"
    )


def read_run(config: Path, overrides: Iterable[str], kind: str) -> tuple[ModelShape, Setting]:
    """Read a run's YAML for an estimate.

    Args:
        config: the file, or a run folder.
        overrides: ``"a.b=c"``.
        kind: sft, reward or dpo.
    Raises:
        UserError: the file is wrong, or the kind is unknown.
    """
    kinds: tuple[Literal["sft", "reward", "dpo", "ppo"], ...] = ("sft", "reward", "dpo", "ppo")
    if kind not in kinds:
        raise UserError(f"estimate: --kind {kind}; it must be one of {', '.join(kinds)}{did_you_mean(kind, kinds)}")
    return setting_of(load_config(_settings_file(config), overrides, kind))


def _settings_file(given: Path) -> Path:
    return given / CONFIG_FILE if given.is_dir() else given


def _gb(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 5e6 else f"{number / 1e6:.2f} MB"
