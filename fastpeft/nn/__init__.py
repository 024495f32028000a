"""Modules: what takes the place of a model's layers, or stands beside them."""

from fastpeft.nn.adapted import Adapted
from fastpeft.nn.adapted_linear import AdaptedLinear
from fastpeft.nn.bottleneck import BottleneckAdapter, BottleneckSite
from fastpeft.nn.ia3 import IA3Linear
from fastpeft.nn.lora import LoRALinear
from fastpeft.nn.lora_embedding import LoRAEmbedding
from fastpeft.nn.lora_experts import LoRAExperts
from fastpeft.nn.nf4 import NF4Linear
from fastpeft.nn.nf4_experts import NF4Experts
from fastpeft.nn.nf4_module import NF4Module
from fastpeft.nn.prompt import PromptEncoder, Prompts, SoftPrompt

__all__ = [
    "Adapted",
    "AdaptedLinear",
    "BottleneckAdapter",
    "BottleneckSite",
    "IA3Linear",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALinear",
    "NF4Experts",
    "NF4Linear",
    "NF4Module",
    "PromptEncoder",
    "Prompts",
    "SoftPrompt",
]
