"""``NF4Config``: how a model is packed into 4 bits, for ``from_pretrained(quantization_config=...)``.

In ``config.json`` it stands as bitsandbytes' section, so that a saved model loads wherever a bitsandbytes checkpoint
does; the registered name ``fastpeft_nf4`` exists in memory only. transformers picks its quantiser by that name, and
one that is taken cannot be registered again: a bitsandbytes folder read by plain ``from_pretrained`` goes to
bitsandbytes, and ``load_pretrained`` renames the section first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastpeft.errors import UserError, did_you_mean
from fastpeft.ops.nf4_weight import BLOCK_SIZES

QUANT_METHOD = "fastpeft_nf4"
_KEYS = ("skip_modules", "block_size", "double_quant", "compute_dtype")
_COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@register_quantization_config(QUANT_METHOD)
class NF4Config(QuantizationConfigMixin):
    """Pack a model's linear layers and experts into 4-bit normal floats while it is loaded.

    Args:
        skip_modules: names of modules to leave dense with everything in them, a whole name or its last parts. The
            output embedding and weights that two modules share stay dense in any case.
        block_size: weights that share a scale, a power of two from 32 to 4096.
        double_quant: quantise the scales too.
        compute_dtype: what bitsandbytes should compute in when it reads the saved model; None for the model's dtype.
            fastpeft computes in the dtype of the activations, which is the model's.
    Raises:
        UserError: a value is out of range.
    Source:
        QLoRA, arXiv 2305.14314.
    """

    def __init__(
        self,
        skip_modules: Collection[str] = (),
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
    ) -> None:
        if block_size not in BLOCK_SIZES:
            raise UserError(f"NF4Config: block_size={block_size}; must be one of {', '.join(map(str, BLOCK_SIZES))}")
        if not isinstance(double_quant, bool):
            raise UserError(f"NF4Config: double_quant={double_quant!r}; must be True or False")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' enumeration is closed, its use not
        self.skip_modules = [skip_modules] if isinstance(skip_modules, str) else list(skip_modules)
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = _read_dtype(compute_dtype)
        # Of a saved model: the patterns of modules that its file says are dense; None where transformers' rule chose.
        self.dense_patterns: list[str] | None = None

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make one from its own keys, as transformers does with the section of a configuration.

        Args:
            config_dict: the arguments of the constructor, and ``dense_patterns`` or ``quant_method``.
            return_unused_kwargs: return the keywords, none of which is used, beside it.
            kwargs: ignored.
        Raises:
            UserError: an unknown key.
        """
        values = {key: value for key, value in config_dict.items() if key not in ("quant_method", "dense_patterns")}
        for key in values:
            if key not in _KEYS:
                raise UserError(f"NF4Config: unknown key '{key}'{did_you_mean(key, _KEYS)}; it has {', '.join(_KEYS)}")
        config = cls(**values)
        config.dense_patterns = config_dict.get("dense_patterns")
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The section of ``config.json`` that bitsandbytes' checkpoints have."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": str(self.compute_dtype or torch.float32).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": self.skip_modules if self.dense_patterns is None else self.dense_patterns,
            "llm_int8_threshold": 6.0,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }


def is_bitsandbytes(section: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` section is bitsandbytes', of whatever number of bits."""
    return section.get("quant_method") == "bitsandbytes" or any(
        section.get(key) for key in ("load_in_4bit", "load_in_8bit")
    )


def from_bitsandbytes(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Turn bitsandbytes' section of a configuration into the one that picks fastpeft's quantiser.

    Block size, double quantisation and dtype of each weight are read from the weights themselves.

    Args:
        section: ``quantization_config`` of a bitsandbytes checkpoint.
        where: what to call the checkpoint in a complaint.
    Returns:
        A section for ``NF4Config.from_dict``.
    Raises:
        UserError: 8 bits, or FP4.
    """
    dense = "load the model that it was made from, in bfloat16, and pack that (fastpeft quantize)"
    if not (section.get("load_in_4bit") or section.get("_load_in_4bit")):
        raise UserError(f"{where}: it is packed by bitsandbytes in 8 bits; fastpeft reads its 4-bit NF4 only: {dense}")
    kind = section.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    if kind != "nf4":
        raise UserError(
            f"{where}: it is packed by bitsandbytes as {str(kind).upper()}; fastpeft reads NF4 only: {dense}"
        )
    return {
        "quant_method": QUANT_METHOD,
        "double_quant": bool(section.get("bnb_4bit_use_double_quant", False)),
        "compute_dtype": section.get("bnb_4bit_compute_dtype"),
        "dense_patterns": section.get("llm_int8_skip_modules"),
    }


def _read_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    if given is None:
        return None
    name = str(given).removeprefix("torch.")
    if name not in _COMPUTE_DTYPES:
        raise UserError(f"NF4Config: compute_dtype={given!r}; must be one of {', '.join(_COMPUTE_DTYPES)}")
    return _COMPUTE_DTYPES[name]
