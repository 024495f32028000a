"""Decoding: tokens from a model's own modules, with a cache in pages, many prompts at once, and CUDA graphs."""

from fastpeft.models.decode.engine import DecodeEngine
from fastpeft.models.decode.options import Completion, DecodeOptions

__all__ = ["Completion", "DecodeEngine", "DecodeOptions"]
