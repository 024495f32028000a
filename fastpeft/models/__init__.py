"""Models: how fastpeft's layers get into Hugging Face models."""

from fastpeft.models.accelerate import Left, Report, accelerate, report, restore
from fastpeft.models.causal_lm import has_fused_loss
from fastpeft.models.quantize import quantize
from fastpeft.models.replace import replace_linear

__all__ = ["Left", "Report", "accelerate", "has_fused_loss", "quantize", "replace_linear", "report", "restore"]
