"""What an estimate needs to know of a model: sizes from its configuration, and what its weights take.

A model of which only the number of parameters is known (``--params 65B``) is taken to be a Llama: of the published
model next in size, with as many of its layers as make that number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn

from fastpeft.errors import UserError
from fastpeft.models.choose import choose_layers, weight_names
from fastpeft.recipes.load import model_skeleton

# hidden, intermediate, layers, heads, kv heads, vocabulary, tied embeddings: SmolLM2, Llama 3.2, Llama 1, Llama 3.1.
_LLAMAS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "360M": (960, 2560, 32, 15, 5, 49152, True),
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "3B": (3072, 8192, 28, 24, 8, 128256, True),
    "7B": (4096, 11008, 32, 32, 32, 32000, False),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
    "13B": (5120, 13824, 40, 40, 40, 32000, False),
    "33B": (6656, 17920, 60, 52, 52, 32000, False),
    "65B": (8192, 22016, 80, 64, 64, 32000, False),
    "70B": (8192, 28672, 80, 64, 8, 128256, False),
    "405B": (16384, 53248, 126, 128, 8, 128256, False),
}
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
# Families whose layers `accelerate` fuses; it says for itself which ones when it has the model.
_FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3")
_NESTED_BLOCK = 256


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes.

    Attributes:
        name: what to call it.
        skeleton: its modules, whose weights take no memory.
        hidden: features of the residual stream, d.
        intermediate: features inside the MLP that a token passes, f; in a mixture, of all its experts.
        experts: that a token passes, e; 0 where there is no mixture.
        layers: L.
        query_width: query heads times their size, q.
        key_width: key heads times their size, k.
        heads: query heads.
        head_size: of a head.
        vocabulary: v.
        fused: whether ``accelerate`` is known to fuse the layers.
    """

    name: str
    skeleton: nn.Module = field(repr=False)
    hidden: int
    intermediate: int
    experts: int
    layers: int
    query_width: int
    key_width: int
    heads: int
    head_size: int
    vocabulary: int
    fused: bool

    @property
    def numels(self) -> dict[str, int]:
        """Numbers of each parameter by name; tied ones once."""
        tied = getattr(self.skeleton, "all_tied_weights_keys", None) or {}
        return {name: p.numel() for name, p in self.skeleton.named_parameters() if name not in tied}

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(self.numels.values())


@dataclass(frozen=True)
class WeightBytes:
    """What a base model's weights take.

    Attributes:
        dense: unquantised weights.
        codes: 4-bit codes.
        scales: of the codes.
    """

    dense: int
    codes: int = 0
    scales: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.dense + self.codes + self.scales


def shape_of(config: transformers.PretrainedConfig, name: str) -> ModelShape:
    """Read a model's sizes off its configuration.

    Args:
        config: of the model.
        name: what to call it.
    Raises:
        UserError: the configuration lacks a size.
    """
    text: Any = config.get_text_config()

    def get(*keys: str) -> int:
        found = next((value for key in keys if isinstance(value := getattr(text, key, None), int)), None)
        if found is None:
            raise UserError(f"estimate: the configuration of {name} has no {keys[0]}, which the formulas need")
        return found

    hidden, heads = get("hidden_size"), get("num_attention_heads")
    head_size = getattr(text, "head_dim", None) or hidden // heads
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    return ModelShape(
        name,
        model_skeleton(config),
        hidden,
        *_mlp_width(text, int(inner)),
        get("num_hidden_layers"),
        heads * head_size,
        (getattr(text, "num_key_value_heads", None) or heads) * head_size,
        heads,
        head_size,
        get("vocab_size"),
        text.model_type in _FUSED,
    )


def _mlp_width(text: Any, inner: int) -> tuple[int, int]:
    """Features inside the MLP that a token passes, and how many experts; those that all tokens pass are no choice."""

    def get(key: str) -> int:
        value = getattr(text, key, None)
        return value if isinstance(value, int) else 0

    experts = get("num_experts_per_tok")
    if not experts:
        return inner, 0
    width = get("moe_intermediate_size") or inner
    shared = get("shared_expert_intermediate_size") or get("n_shared_experts") * width
    return experts * width + shared, experts


def shape_of_size(params: str) -> ModelShape:
    """A Llama of about so many parameters.

    Args:
        params: "65B", "350M", or a plain number.
    Raises:
        UserError: it is no number.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([KMBT]?)\s*", params, re.IGNORECASE)
    count = float(match[1]) * _UNITS.get(match[2].upper(), 1) if match else 0.0
    if count < 1e6:
        raise UserError(f"estimate: --params {params}: give a number of parameters of at least 1M, such as 8B or 350M")
    name = min(_LLAMAS, key=lambda known: abs(_ratio(count, known)))
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = _LLAMAS[name]
    exact = params.strip().upper() == name
    if not exact:
        kv = hidden // heads * kv_heads
        a_layer = 2 * hidden * (hidden + kv) + 3 * hidden * inner + 2 * hidden
        layers = max(1, round((count - vocabulary * hidden * (1 if tied else 2)) / a_layer))
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    return shape_of(config, f"a Llama of {name}" if exact else f"a Llama of {layers} layers of the {name} model")


def _ratio(count: float, known: str) -> float:
    size = float(known[:-1]) * _UNITS[known[-1]]
    return max(count / size, size / count) - 1


def weight_bytes(
    shape: ModelShape,
    itemsize: int,
    quantized: bool = False,
    block_size: int = 64,
    double_quant: bool = True,
    skip: list[str] | None = None,
) -> WeightBytes:
    """What the weights take: p times ``itemsize``; packed, half a byte a number and its share of scales.

    A packed weight of p numbers has ceil(p / block) scales of 4 bytes, or double quantised of 1 byte with 4 more for
    each 256 of them and 4 for their mean.

    Args:
        shape: the model.
        itemsize: bytes of a dense number.
        quantized: pack the layers that `fastpeft.quantize` packs.
        block_size: numbers that share a scale.
        double_quant: quantise the scales too.
        skip: names of layers that stay dense.
    """
    numels = shape.numels
    if not quantized:
        return WeightBytes(itemsize * sum(numels.values()))
    packed = set(weight_names(choose_layers(shape.skeleton, skip or [], block_size)))
    codes = scales = 0
    for name in packed:
        blocks = -(-numels[name] // block_size)
        codes += (numels[name] + 1) // 2
        scales += blocks + 4 * -(-blocks // _NESTED_BLOCK) + 4 if double_quant else 4 * blocks
    return WeightBytes(itemsize * sum(n for name, n in numels.items() if name not in packed), codes, scales)
