"""Models: how fastpeft's layers get into Hugging Face models."""

from fastpeft.models.accelerate import Left, Report, accelerate, report, restore
from fastpeft.models.causal_lm import has_fused_loss
from fastpeft.models.decode import Completion, DecodeEngine, DecodeOptions
from fastpeft.models.nf4_config import NF4Config
from fastpeft.models.pretrained import load_pretrained
from fastpeft.models.quantize import dequantize, quantize
from fastpeft.models.replace import replace_linear
from fastpeft.models.stock_peft import use_in_peft

__all__ = [
    "Completion",
    "DecodeEngine",
    "DecodeOptions",
    "Left",
    "NF4Config",
    "Report",
    "accelerate",
    "dequantize",
    "has_fused_loss",
    "load_pretrained",
    "quantize",
    "replace_linear",
    "report",
    "restore",
    "use_in_peft",
]
