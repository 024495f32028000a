"""Decoding: tokens from a model's own modules, with a cache in pages, many prompts at once, and CUDA graphs."""

from fastpeft.models.decode.engine import CannotDecode, DecodeEngine, Token
from fastpeft.models.decode.fallback import Decoder, TransformersDecoder, make_decoder
from fastpeft.models.decode.options import Completion, DecodeOptions

__all__ = [
    "CannotDecode",
    "Completion",
    "DecodeEngine",
    "DecodeOptions",
    "Decoder",
    "Token",
    "TransformersDecoder",
    "make_decoder",
]
