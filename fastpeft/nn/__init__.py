"""Modules: the layers that stand in a model."""

from fastpeft.nn.lora import LoRALinear
from fastpeft.nn.nf4 import NF4Linear

__all__ = ["LoRALinear", "NF4Linear"]
