"""Does it fit, and what is the nearest setting that does: a search over settings by how much each changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from fastpeft.methods import (
    BottleneckAdapterConfig,
    FullConfig,
    LoraConfig,
    PromptEncoderConfig,
)
from fastpeft.recipes.estimate import Estimate, Setting, estimate
from fastpeft.recipes.estimate_model import ModelShape

# What CUDA itself and the libraries take before the first tensor, and what the allocator cannot use of the rest.
_CONTEXT_BYTES = 600_000_000
_FRAGMENTED = 0.03
_SHORTEST = 256


@dataclass(frozen=True)
class Fit:
    """A setting that fits.

    Attributes:
        setting: the setting.
        estimate: what it takes.
        changes: what to change for it, as keys of the YAML with their values.
    """

    setting: Setting
    estimate: Estimate
    changes: tuple[str, ...]


def usable(gpu_bytes: int) -> int:
    """Bytes of a GPU's memory that tensors can have: without 0.6 GB of CUDA's and 3% lost between blocks."""
    return max(0, int(gpu_bytes * (1 - _FRAGMENTED)) - _CONTEXT_BYTES)


def nearest_fit(shape: ModelShape, setting: Setting, gpu_bytes: int) -> Fit | None:
    """The setting that fits and changes least, or None where none of those tried does.

    Tried, from what changes no result to what changes most: other checkpointing; smaller batches with more
    accumulation; the optimizer's state in 8 bits and paged; fused layers; an NF4 base; shorter rows; QLoRA in place of
    full training.

    Args:
        shape: the model.
        setting: what was asked for.
        gpu_bytes: the GPU's memory.
    Raises:
        UserError: the method does not fit the model.
    """
    room = usable(gpu_bytes)
    for changes, changed in sorted(_variants(setting), key=lambda variant: variant[0].cost):
        found = estimate(shape, changed)
        if found.total <= room:
            return Fit(changed, found, changes.named)
    return None


@dataclass(frozen=True)
class _Changes:
    cost: float
    named: tuple[str, ...]


def _variants(setting: Setting) -> Iterator[tuple[_Changes, Setting]]:
    levers = [_checkpointing(setting), _batches(setting), _optimizers(setting), _bases(setting), _lengths(setting)]
    for choice in product(*levers):
        changed, named = setting, []
        for _, name, fields in choice:
            changed = dataclasses.replace(changed, **fields)
            named += [name] if name else []
        yield _Changes(sum(cost for cost, _, _ in choice), tuple(named)), changed


_Lever = list[tuple[float, str, dict[str, Any]]]


def _checkpointing(setting: Setting) -> _Lever:
    levers: _Lever = [(0, "", {})]
    order = ("none", "selective", "full", "offload")
    for place, mode in enumerate(order[order.index(setting.checkpointing) + 1 :]):
        if mode != "selective":
            named = f"model.checkpointing={mode}"
            fields: dict[str, Any] = {"checkpointing": mode, "activation_budget": None}
            if not setting.fused and mode == "offload":
                named, fields = f"model.accelerate=true {named}", {**fields, "fused": True}
            levers.append((1 + place, named, fields))
    return levers


def _batches(setting: Setting) -> _Lever:
    levers: _Lever = [(0, "", {})]
    batch, accumulation = setting.batch, setting.accumulation
    while batch > 1 and batch % 2 == 0:
        batch, accumulation = batch // 2, accumulation * 2
        named = f"train.per_device_train_batch_size={batch} train.gradient_accumulation_steps={accumulation}"
        levers.append((0.9 * len(levers), named, {"batch": batch, "accumulation": accumulation}))
    return levers


def _optimizers(setting: Setting) -> _Lever:
    levers: _Lever = [(0, "", {})]
    if not setting.optimizer.startswith("paged"):
        paged = "paged_adamw_8bit" if setting.optimizer.endswith("8bit") else "paged_adamw"
        levers.append((4, f"train.optimizer={paged}", {"optimizer": paged, "optim_budget": None}))
    return levers


def _bases(setting: Setting) -> _Lever:
    levers: _Lever = [(0, "", {})]
    if isinstance(setting.method, FullConfig):
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        for cost, name, quantize in (
            (30, "peft.method=lora", False),
            (40, "peft.method=lora model.quantize=nf4", True),
        ):
            levers.append((cost, name, {"method": lora, "quantize": quantize}))
    elif not setting.quantize:
        levers.append((10, "model.quantize=nf4", {"quantize": True}))
    return levers


def _lengths(setting: Setting) -> _Lever:
    levers: _Lever = [(0, "", {})]
    length = setting.length // 2
    while length >= _SHORTEST:
        levers.append((15.0 * len(levers), f"data.max_length={length}", {"length": length}))
        length //= 2
    return levers


def method_table(shape: ModelShape, setting: Setting) -> dict[str, tuple[Setting, Estimate]]:
    """What each method takes of the same model with the same rows, by its name.

    Args:
        shape: the model.
        setting: batch, length, optimizer and checkpointing of all of them; a LoRA adapter's options if it is one.
    Raises:
        UserError: a method does not fit the model.
    """
    given = setting.method
    lora = given if isinstance(given, LoraConfig) else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    methods = {
        "full": (FullConfig(), False),
        "lora": (lora, False),
        "qlora": (lora, True),
        "p_tuning": (PromptEncoderConfig(num_virtual_tokens=20), False),
        "adapter": (BottleneckAdapterConfig("houlsby"), False),
    }
    rows = {}
    for name, (method, quantize) in methods.items():
        changed = dataclasses.replace(setting, method=method, quantize=quantize)
        rows[name] = changed, estimate(shape, changed)
    return rows
