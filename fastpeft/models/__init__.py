"""Models: how fastpeft's layers get into Hugging Face models."""

from fastpeft.models.quantize import quantize
from fastpeft.models.replace import replace_linear

__all__ = ["quantize", "replace_linear"]
