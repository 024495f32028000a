"""Ops: ``torch.library`` definitions over the native core, and the autograd functions around them."""

from fastpeft.ops.adamw import adamw_
from fastpeft.ops.cross_entropy import linear_cross_entropy, linear_logprobs
from fastpeft.ops.glu import geglu, swiglu
from fastpeft.ops.lora import lora_linear, lora_linear_group, lora_linear_plan
from fastpeft.ops.native import build_info
from fastpeft.ops.nf4 import nf4_dequantize, nf4_linear, nf4_linear_add_, nf4_linear_plan, nf4_quantize
from fastpeft.ops.nf4_experts import nf4_linear_experts, nf4_linear_experts_plan
from fastpeft.ops.nf4_group import nf4_linear_group
from fastpeft.ops.nf4_weight import NF4Weight
from fastpeft.ops.paged_attention import paged_attention
from fastpeft.ops.paged_store import paged_store_
from fastpeft.ops.rms_norm import rms_norm
from fastpeft.ops.rope import rope
from fastpeft.ops.sample import SamplingState, sample_

__all__ = [
    "NF4Weight",
    "SamplingState",
    "adamw_",
    "build_info",
    "geglu",
    "linear_cross_entropy",
    "linear_logprobs",
    "lora_linear",
    "lora_linear_group",
    "lora_linear_plan",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_linear_add_",
    "nf4_linear_experts",
    "nf4_linear_experts_plan",
    "nf4_linear_group",
    "nf4_linear_plan",
    "nf4_quantize",
    "paged_attention",
    "paged_store_",
    "rms_norm",
    "rope",
    "sample_",
    "swiglu",
]
