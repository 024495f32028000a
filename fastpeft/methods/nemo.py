"""Adapters of NeMo, as safetensors, in a Hugging Face model: LoRA, P-tuning and bottleneck adapters.

NeMo adapts fused layers. Its ``linear_qkv`` (NeMo 1: ``attention_qkv``) computes queries, keys and values at once, and
its rows go by groups of queries that share a key: with four query heads, two groups and heads of one row,

    row of B   0   1   2   3   4   5   6   7
    belongs to q0  q1  k0  v0  q2  q3  k1  v1       so q is rows 0 1 4 5, k is rows 2 6, v is rows 3 7

``linear_fc1`` is the gate's rows and then the up-projection's. Such an adapter has one A for all of its parts, which
here is LoRA with ``shared_a``; adapters that NeMo calls canonical have an A for each part.

    NeMo 1   ...layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight      A (r, k)
    NeMo 2   ...layers.0.self_attention.linear_qkv.adapter.linear_out.weight                 B (n, r)

NeMo scales by alpha / r, and its files of weights do not say alpha: it comes from ``model_config.yaml`` beside them, or
from the caller. The bottleneck's two LayerNorm places, and P-tuning's table, are told apart by their names.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods.bottleneck import ATTENTION_SITE, OUTPUT_SITE, BottleneckAdapterConfig
from fastpeft.methods.causal_lm import wrapper_class
from fastpeft.methods.config_base import AdapterConfig, is_number
from fastpeft.methods.files import KEY_PREFIX, AdapterFile, read_tensors
from fastpeft.methods.lora_config import LoraConfig
from fastpeft.methods.model import PeftModel
from fastpeft.methods.prompts import PromptEncoderConfig

_PICKLES = (".nemo", ".ckpt", ".pt", ".pth", ".bin", ".distcp", ".tar")
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# NeMo's layer, in the names of either version, and the Hugging Face layers that it fuses.
_LAYERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora_kqv_adapter": ("self_attn", _QKV),
    "lora_unfused_kqv_adapter": ("self_attn", _QKV),
    "linear_qkv": ("self_attn", _QKV),
    "lora_dense_attention_adapter": ("self_attn", ("o_proj",)),
    "linear_proj": ("self_attn", ("o_proj",)),
    "lora_hto4h_adapter": ("mlp", _GATE_UP),
    "lora_unfused_hto4h_adapter": ("mlp", _GATE_UP),
    "linear_fc1": ("mlp", _GATE_UP),
    "lora_4htoh_adapter": ("mlp", ("down_proj",)),
    "linear_fc2": ("mlp", ("down_proj",)),
}
_PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "gate_proj", "up": "up_proj"}
_LORA = re.compile(
    rf"(?:.*\.)?layers\.(\d+)\.(?:self_attention|mlp)\.(?:adapter_layer\.)?({'|'.join(_LAYERS)})(?:\.adapter)?"
    r"(?:\.(?:adapter_(q|k|v|gate|up)|(q|k|v|gate|up)_adapter))?\.linear_(in|out)\.weight"
)
_STACKED = re.compile(r"(.*\blayers)\.((?:self_attention|mlp|adapter_layer)\..*)")
_BOTTLENECK = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?adapter_([12])\.(.+)")
_PROMPT = re.compile(r"(?:.*\.)?ptuning_adapter\.(.+)")
_ENCODER = {"embedding": "embedding", "first": "mlp_head.0", "second": "mlp_head.2"}
# NeMo's parallel adapter names its modules, its linear adapter numbers them by the place of the norm.
_SITES: dict[str, dict[str, str]] = {
    "parallel_adapter": {"linear_in": "adapter_down.0", "linear_out": "adapter_up", "layer_norm": ""},
    "pre": {"module.0": "adapter_norm_before", "module.1": "adapter_down.0", "module.3": "adapter_up"},
    "post": {"module.0": "adapter_down.0", "module.2": "adapter_up", "module.3": "adapter_norm_after"},
}


def load_nemo_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    alpha: float | None = None,
    norm_position: str | None = None,
    is_trainable: bool = False,
) -> PeftModel:
    """Wrap a model with an adapter that NeMo trained on it; ``save_pretrained`` then writes it in PEFT's layout.

    Args:
        model: the base model, with projections named as Llama's; its layers are changed in place.
        path: a safetensors file with NeMo's names, or a folder that holds one.
        adapter_name: name to give the adapter.
        alpha: of LoRA. None reads it from ``model_config.yaml`` in the folder.
        norm_position: of a parallel_adapter, "pre" or "post". None reads it there, and is "pre" where nothing is said.
        is_trainable: let it train; otherwise it comes frozen and the model in evaluation mode.
    Returns:
        The wrapped model.
    Raises:
        UserError: the file is a pickle or an archive, holds names that are not known, or does not fit the model; LoRA's
            alpha is not known. The model is left as it was.
    """
    file = nemo_adapter(model, path, alpha=alpha, norm_position=norm_position)
    file.config.inference_mode = not is_trainable
    wrapped = wrapper_class(model)(model, file.config, adapter_name, weights=file)
    return wrapped if is_trainable else wrapped.eval()


def nemo_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    norm_position: str | None = None,
) -> AdapterFile:
    """Convert an adapter of NeMo to the names and shapes of this model; the model is not changed.

    Args:
        model: as in `load_nemo_adapter`, like the others.
        path: the file or folder.
        alpha: of LoRA.
        norm_position: of a parallel_adapter.
    Raises:
        UserError: as there.
    """
    weights = _weights_file(Path(path))
    settings = _settings(weights.parent)
    tensors = _unstacked(read_tensors(weights))
    for pattern, convert in ((_LORA, _lora), (_BOTTLENECK, _bottleneck), (_PROMPT, _prompt)):
        matches = {key: match for key in tensors if (match := pattern.fullmatch(key))}
        if matches:
            foreign = [key for key in tensors if key not in matches and not key.endswith("inference_table")]
            _refuse_unknown(weights, foreign)
            given = {"alpha": alpha, "norm_position": norm_position}
            options = {key: settings.get(key) if value is None else value for key, value in given.items()}
            found = {match: tensors[key] for key, match in matches.items()}
            config, converted, encoder = convert(model, weights, found, options)
            return AdapterFile(weights, config, converted, encoder)
    _refuse_unknown(weights, list(tensors))
    raise AssertionError("a file of weights has at least one")


# --- files ---
def _weights_file(path: Path) -> Path:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not path.exists():
        raise UserError(f"NeMo adapter '{path}': there is no such file or folder")
    if len(files) > 1:
        raise UserError(f"NeMo adapter '{path}': it holds {', '.join(f.name for f in files)}; give one of these")
    if not files or files[0].suffix != ".safetensors":
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
        pickles = [f.name for f in inside if f.suffix in _PICKLES or f.name == "common.pt"]
        if pickles:
            raise UserError(
                f"NeMo adapter '{path}': {pickles[0]} holds a pickle, which can run code when it is opened, so it is "
                "not read here. If you trust it, convert it once, where NeMo is installed or after unpacking the "
                "archive (tar xf): safetensors.torch.save_file(torch.load('model_weights.ckpt', weights_only=True), "
                "'adapter.safetensors'), and keep model_config.yaml beside it"
            )
        raise UserError(f"NeMo adapter '{path}': it needs a safetensors file with the adapter's weights")
    return files[0]


def _settings(folder: Path) -> dict[str, Any]:
    """What ``model_config.yaml`` of a NeMo checkpoint says about its adapter, where it lies there."""
    file = folder / "model_config.yaml"
    if not file.is_file():
        return {}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        peft = (values.get("model") or values).get("peft") or {}
        lora, adapter = (peft.get(key) or {} for key in ("lora_tuning", "adapter_tuning"))
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{file}: it cannot be read as a NeMo configuration ({error})") from error
    alpha, dim = lora.get("alpha"), lora.get("adapter_dim")
    found = {"alpha": alpha if is_number(alpha) else dim, "norm_position": adapter.get("norm_position")}
    return {key: value for key, value in found.items() if value is not None}


def _unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with a number in every layer's name: distributed checkpoints have one for all layers."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := _STACKED.fullmatch(key):
            found.update({f"{match[1]}.{layer}.{match[2]}": part for layer, part in enumerate(tensor)})
        else:
            found[key] = tensor
    return found


def _refuse_unknown(weights: Path, keys: list[str]) -> None:
    if keys:
        raise UserError(
            f"NeMo adapter '{weights}': {len(keys)} names are not known, such as {', '.join(sorted(keys)[:3])}; known "
            "are LoRA (lora_kqv_adapter, linear_qkv and their siblings), adapter_1 and adapter_2, and ptuning_adapter. "
            "A checkpoint of the whole model needs its adapter alone, or merging in NeMo"
        )


# --- kinds ---
_Found = Mapping[re.Match[str], Tensor]
_Converted = tuple[AdapterConfig, dict[str, Tensor], dict[str, Tensor]]


def _lora(model: nn.Module, weights: Path, found: _Found, options: Mapping[str, Any]) -> _Converted:
    prefix = _layers_prefix(model, "self_attn.q_proj", weights)
    pairs: dict[tuple[int, str], dict[str, Tensor]] = defaultdict(dict)
    shared, fused = True, False
    for match, tensor in found.items():
        layer, nemo, part, side = int(match[1]), match[2], match[3] or match[4], match[5]
        parent, parts = _LAYERS[nemo]
        if part is not None:
            parts, shared = (_PARTS[part],), False
        fused |= len(parts) > 1
        split = _split(model, weights, parts, tensor) if side == "out" else [tensor] * len(parts)
        for name, piece in zip(parts, split, strict=True):
            pairs[layer, f"{parent}.{name}"][side] = piece
    broken = [f"layer {layer} {name}" for (layer, name), pair in pairs.items() if pair.keys() != {"in", "out"}]
    if broken:
        raise UserError(f"NeMo adapter '{weights}': {broken[0]} has only one of linear_in and linear_out")
    ranks = {name: pair["in"].shape[0] for (_, name), pair in pairs.items()}
    rank = max(ranks.values())
    alpha = options["alpha"]
    if not is_number(alpha) or alpha <= 0:
        raise UserError(
            f"NeMo adapter '{weights}': alpha is not in the file, and there is no model_config.yaml beside it; give "
            f"load_nemo_adapter alpha= as it was trained (NeMo 1's default is adapter_dim, here {rank}; NeMo 2's is 32)"
        )
    layers = sorted({layer for layer, _ in pairs})
    every = layers == list(range(_layer_count(model)))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted({name.rpartition(".")[2] for name in ranks}),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        layers_to_transform=None if every else layers,
        shared_a=shared and fused,
    )
    tensors = {}
    for (layer, name), pair in pairs.items():
        key = f"{KEY_PREFIX}{prefix}.{layer}.{name}"
        tensors[f"{key}.lora_A.weight"] = pair["in"].contiguous()
        tensors[f"{key}.lora_B.weight"] = pair["out"].contiguous()
    return config, tensors, {}


def _split(model: nn.Module, weights: Path, parts: tuple[str, ...], b: Tensor) -> list[Tensor]:
    """Rows of a fused B by the layers that they belong to."""
    if len(parts) == 1:
        return [b]
    if parts == _GATE_UP:
        if b.shape[0] % 2:
            raise UserError(f"NeMo adapter '{weights}': linear_fc1 has {b.shape[0]} rows, which are no gate and up")
        return list(b.chunk(2))
    config: Any = model.config
    text = config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return split_qkv(b, heads, groups, size, str(weights))


def split_qkv(b: Tensor, heads: int, groups: int, size: int, where: str = "linear_qkv") -> list[Tensor]:
    """Take the rows of queries, keys and values out of NeMo's order.

    Args:
        b: ``((heads + 2 groups) size, r)``.
        heads: of queries.
        groups: of queries that share a key; the key heads.
        size: rows of a head.
        where: what to call it in a complaint.
    Returns:
        ``(heads size, r)``, and twice ``(groups size, r)``.
    Raises:
        UserError: another number of rows.
    """
    rows = (heads + 2 * groups) * size
    if b.shape[0] != rows:
        raise UserError(
            f"NeMo adapter '{where}': linear_qkv has {b.shape[0]} rows, and this model's {heads} query heads and "
            f"{groups} key heads of {size} make {rows}; it was trained on another model"
        )
    grouped = b.view(groups, heads // groups + 2, size, -1)
    parts = grouped.split([heads // groups, 1, 1], 1)
    return [part.reshape(-1, b.shape[1]) for part in parts]


def _bottleneck(model: nn.Module, weights: Path, found: _Found, options: Mapping[str, Any]) -> _Converted:
    prefix = _layers_prefix(model, "self_attn", weights)
    tails = {match[3].rpartition(".")[0] for match in found}
    if "linear_in" in tails:
        kind, names = "parallel_adapter", dict(_SITES["parallel_adapter"])
        position = options["norm_position"] or "pre"
        names["layer_norm"] = "adapter_norm_before" if position == "pre" else "adapter_norm_after"
        norm: str | None = position if "layer_norm" in tails else None
    else:
        # A LayerNorm has a vector as weight; it comes first or last.
        first = {tensor.dim() for match, tensor in found.items() if match[3] == "module.0.weight"}
        norm = "pre" if first == {1} else "post"
        kind, names = "linear_adapter", _SITES[norm]
    _refuse_unknown(weights, [match[0] for match in found if match[3].rpartition(".")[0] not in names])
    tensors: dict[str, Tensor] = {}
    for match, tensor in found.items():
        place = ATTENTION_SITE if match[2] == "1" else OUTPUT_SITE
        name, _, leaf = match[3].rpartition(".")
        key = f"{prefix}.{match[1]}.{place}.adapters.default.{names[name]}.{leaf}"
        tensors[key] = tensor
        if leaf == "weight" and tensor.dim() == 2:  # NeMo's have no bias
            tensors.setdefault(key.removesuffix("weight") + "bias", torch.zeros(tensor.shape[0], dtype=tensor.dtype))
    down = {t.shape[0] for key, t in tensors.items() if key.endswith("adapter_down.0.weight")}
    if len(down) != 1:
        raise UserError(f"NeMo adapter '{weights}': it has no linear_in, or several sizes of it: {sorted(down)}")
    present = {int(match[1]) for match in found}
    config = BottleneckAdapterConfig(
        kind,
        mh_adapter=any(match[2] == "1" for match in found),
        output_adapter=any(match[2] == "2" for match in found),
        bottleneck_size=down.pop(),
        ln_before=norm == "pre",
        ln_after=norm == "post",
        leave_out=[layer for layer in range(_layer_count(model)) if layer not in present],
    )
    return config, tensors, {}


def _prompt(model: nn.Module, weights: Path, found: _Found, options: Mapping[str, Any]) -> _Converted:
    encoder = {}
    for match, tensor in found.items():
        name, _, leaf = match[1].rpartition(".")
        if name in _ENCODER:
            encoder[f"{_ENCODER[name]}.{leaf}"] = tensor
        elif match[1] != "inference_table":
            _refuse_unknown(weights, [match[0]])
    needed = {"embedding.weight", *(f"mlp_head.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias"))}
    if encoder.keys() != needed:
        raise UserError(
            f"NeMo adapter '{weights}': ptuning_adapter needs embedding, first and second with their weights and "
            f"biases; there are {', '.join(sorted(match[1] for match in found))}"
        )
    table, first = encoder["embedding.weight"], encoder["mlp_head.0.weight"]
    config = PromptEncoderConfig(
        num_virtual_tokens=table.shape[0],
        encoder_reparameterization_type="NEMO",
        encoder_hidden_size=first.shape[0],
        encoder_embedding_dim=table.shape[1],
    )
    hidden = nn.functional.gelu(nn.functional.linear(table.float(), first.float(), encoder["mlp_head.0.bias"].float()))
    tokens = nn.functional.linear(hidden, encoder["mlp_head.2.weight"].float(), encoder["mlp_head.2.bias"].float())
    return config, {"prompt_embeddings": tokens}, encoder


# --- the model ---
def _layers_prefix(model: nn.Module, inside: str, weights: Path) -> str:
    """Name of the list of layers that have such a module."""
    names = (name for name, _ in model.named_modules())
    found = _first(re.fullmatch(rf"(.*\blayers)\.\d+\.{re.escape(inside)}", name) for name in names)
    if found is None:
        raise UserError(
            f"NeMo adapter '{weights}': {type(model).__name__} has no layers with {inside}, as Llama has; an adapter "
            "of NeMo goes into models whose projections are named so"
        )
    return found[1]


def _first(matches: Iterable[re.Match[str] | None]) -> re.Match[str] | None:
    return next((match for match in matches if match), None)


def _layer_count(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().num_hidden_layers)
