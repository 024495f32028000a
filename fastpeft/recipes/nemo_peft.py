"""NeMo's ``peft_scheme`` and what belongs to it -> the section ``peft``.

| peft_scheme | method | fields |
| --- | --- | --- |
| lora, qlora | lora, qlora | adapter_dim r; alpha, else adapter_dim; target names; variant nemo: shared_a |
| adapter | adapter | type adapter_type; adapter_dim bottleneck_size; norm_position ln_before, ln_after |
| ptuning | p_tuning | virtual_tokens; bottleneck_dim and embedding_dim of NeMo's encoder |
| ia3 | ia3 | |
| selective | full | tunable_base_param_names train |
| none, null | none | all weights |

Layers are counted from 1 in NeMo and from 0 here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError, did_you_mean
from fastpeft.recipes.nemo_keys import FAMILIES, SINGLE_TARGETS, TARGETS
from fastpeft.recipes.nemo_settings import NemoSettings
from fastpeft.recipes.paths import found
from fastpeft.recipes.yaml_file import Settings

_SCHEME = "model.peft.peft_scheme"
_SCHEMES = ("lora", "qlora", "adapter", "ptuning", "ia3", "selective", "none")
# Parts of Megatron's parameter names -> of those in the Hugging Face layout.
_PARTS = {
    "self_attention": "self_attn",
    "word_embeddings": "embed_tokens",
    "embedding": "embed_tokens",
    "output_layer": "lm_head",
    "final_layernorm": "norm",
    "linear_qkv": "(q_proj|k_proj|v_proj)",
    "linear_proj": "o_proj",
    "linear_fc1": "(gate_proj|up_proj)",
    "linear_fc2": "down_proj",
}


def translate_peft(nemo: NemoSettings) -> None:
    """Put the section ``peft``.

    Args:
        nemo: the file's settings; the model's path stands already.
    Raises:
        UserError: a scheme or a value that has no meaning here.
    """
    scheme = str(nemo.get(_SCHEME, "none")).lower()
    if scheme not in _SCHEMES:
        raise nemo.refusal(_SCHEME, f"it takes {', '.join(_SCHEMES)}{did_you_mean(scheme, _SCHEMES)}")
    if scheme in _FIELDS:
        _FIELDS[scheme](nemo)
    method = {"ptuning": "p_tuning", "selective": "full"}.get(scheme, scheme)
    nemo.put("peft.method", method, _SCHEME)


def target_names(target: str, family: str | None) -> tuple[str, ...] | None:
    """Names of layers in a model of the Hugging Face layout, for NeMo's name of a target; None for an unknown one.

    Args:
        target: NeMo 1's or NeMo 2's name.
        family: ``model_type`` of the model's configuration.
    """
    if target in SINGLE_TARGETS:
        return (SINGLE_TARGETS[target],)
    names = FAMILIES.get(family, FAMILIES[None])
    parts = TARGETS.get(target, (target,))
    return tuple(name for part in parts for name in names[part]) if all(part in names for part in parts) else None


def model_family(path: str, yaml: str) -> str | None:
    """``model_type`` of a model folder, read from its config.json; None where there is none to read.

    Args:
        path: the model's.
        yaml: the file that names it, beside which the folder may lie.
    """
    folder = found(Settings(yaml, {}, {}), Path(path))
    try:
        config = json.loads(((folder or Path(path)) / "config.json").read_text(encoding="utf-8"))
        return str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lora(nemo: NemoSettings) -> None:
    section = "model.peft.lora_tuning"
    rank = nemo.whole(f"{section}.adapter_dim", 32)
    nemo.put("peft.r", rank, f"{section}.adapter_dim")
    nemo.put("peft.lora_alpha", nemo.get(f"{section}.alpha", rank), f"{section}.alpha")
    dropout = nemo.number(f"{section}.adapter_dropout", 0.0)
    nemo.put("peft.lora_dropout", dropout, f"{section}.adapter_dropout")
    if dropout and nemo.choice(f"{section}.dropout_position", ("pre", "post"), "post") == "post":
        nemo.note(f"{section}.adapter_dropout", "acts on the low-rank path's input, in NeMo 1 on its output")
    variant = nemo.choice(f"{section}.variant", ("nemo", "canonical"), "nemo")
    nemo.put("peft.shared_a", variant == "nemo", f"{section}.variant")
    start = nemo.choice(f"{section}.column_init_method", ("xavier", "normal"), "xavier")
    nemo.put("peft.init_lora_weights", True if start == "xavier" else "gaussian", f"{section}.column_init_method")
    if layers := _layers(nemo, f"{section}.layer_selection"):
        nemo.put("peft.layers_to_transform", layers, f"{section}.layer_selection")
    targets = nemo.get(f"{section}.target_modules", ["attention_qkv"])
    family = model_family(str(nemo.value("model.path")), nemo.file)
    names: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        named = target_names(str(target), family)
        if named is None:
            known = [*FAMILIES[None], *TARGETS, *SINGLE_TARGETS]
            raise nemo.refusal(
                f"{section}.target_modules",
                f"{target!r} is none of {', '.join(known)}{did_you_mean(target, known)}",
            )
        names += [name for name in named if name not in names]
    nemo.put("peft.target_modules", names, f"{section}.target_modules")


def _adapter(nemo: NemoSettings) -> None:
    section = "model.peft.adapter_tuning"
    kind = nemo.choice(f"{section}.type", ("parallel_adapter", "linear_adapter"), "parallel_adapter")
    nemo.put("peft.adapter_type", kind, f"{section}.type")
    nemo.put("peft.bottleneck_size", nemo.whole(f"{section}.adapter_dim", 32), f"{section}.adapter_dim")
    nemo.put("peft.dropout", nemo.number(f"{section}.adapter_dropout", 0.0), f"{section}.adapter_dropout")
    if kind == "parallel_adapter":
        position = nemo.get(f"{section}.norm_position") if nemo.has(f"{section}.norm_position") else None
        if position not in ("pre", "post", None):
            raise nemo.refusal(f"{section}.norm_position", "it takes pre, post or null")
        nemo.put("peft.ln_before", position == "pre", f"{section}.norm_position")
        nemo.put("peft.ln_after", position == "post", f"{section}.norm_position")
        start = nemo.choice(f"{section}.column_init_method", ("xavier", "normal"), "xavier")
        nemo.put("peft.init_weights", {"normal": "zero"}.get(start, start), f"{section}.column_init_method")
    if layers := _layers(nemo, f"{section}.layer_selection"):
        count = _layer_count(nemo, f"{section}.layer_selection")
        nemo.put("peft.leave_out", [n for n in range(count) if n not in layers], f"{section}.layer_selection")


def _p_tuning(nemo: NemoSettings) -> None:
    section = "model.peft.p_tuning"
    nemo.put("peft.encoder_reparameterization_type", "NEMO", _SCHEME)
    for ours, theirs, default in (
        ("num_virtual_tokens", "virtual_tokens", 10),
        ("encoder_hidden_size", "bottleneck_dim", 1024),
        ("encoder_embedding_dim", "embedding_dim", 1024),
    ):
        nemo.put(f"peft.{ours}", nemo.whole(f"{section}.{theirs}", default), f"{section}.{theirs}")
    if nemo.number(f"{section}.init_std", 0.023) != 0.023:
        raise nemo.refusal(f"{section}.init_std", "virtual tokens begin with a deviation of 0.023 here")


def _selective(nemo: NemoSettings) -> None:
    name = "model.peft.selective_tuning.tunable_base_param_names"
    given = nemo.get(name, ["self_attention", "word_embeddings"])
    parts = [given] if isinstance(given, str) else given
    if not parts or not all(isinstance(part, str) and part for part in parts):
        raise nemo.refusal(name, "it takes parts of parameter names, such as [self_attention]")
    listed = "|".join(_PARTS.get(part, re.escape(part)) for part in parts)
    nemo.put("peft.train", rf".*({listed}).*", name)


def _layers(nemo: NemoSettings, name: str) -> list[int]:
    given: Any = nemo.get(name, [])
    if not isinstance(given, list) or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in given):
        raise nemo.refusal(name, "it takes numbers of layers, counted from 1, such as [1, 12]")
    return [n - 1 for n in given]


def _layer_count(nemo: NemoSettings, name: str) -> int:
    """Layers of the model, which its configuration says."""
    from fastpeft.recipes.load import read_config
    from fastpeft.recipes.sections import ModelConfig

    try:
        config = read_config(ModelConfig(path=str(nemo.value("model.path")), gguf_file=nemo.value("model.gguf_file")))
        return int(config.get_text_config().num_hidden_layers)
    except (UserError, AttributeError) as error:
        raise nemo.refusal(name, f"how many layers the model has could not be read: {error}") from error


_FIELDS: dict[str, Callable[[NemoSettings], None]] = {
    "lora": _lora,
    "qlora": _lora,
    "adapter": _adapter,
    "ptuning": _p_tuning,
    "selective": _selective,
}
