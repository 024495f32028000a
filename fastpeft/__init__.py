"""Fine-tuning of language models with handwritten NF4, LoRA and optimizer kernels.

Names are imported when first used, so that ``import fastpeft`` and ``fastpeft --help`` cost no torch import.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "AdamW": "fastpeft.optim",
    "BottleneckAdapterConfig": "fastpeft.methods",
    "CudaError": "fastpeft.errors",
    "FastpeftError": "fastpeft.errors",
    "DPOConfig": "fastpeft.trainers",
    "DPOTrainer": "fastpeft.trainers",
    "FullConfig": "fastpeft.methods",
    "IA3Config": "fastpeft.methods",
    "LoRALinear": "fastpeft.nn",
    "LoraConfig": "fastpeft.methods",
    "NF4Config": "fastpeft.models",
    "NF4Linear": "fastpeft.nn",
    "PPOConfig": "fastpeft.trainers",
    "PPOTrainer": "fastpeft.trainers",
    "PeftModel": "fastpeft.methods",
    "RewardConfig": "fastpeft.trainers",
    "RewardTrainer": "fastpeft.trainers",
    "PromptEncoderConfig": "fastpeft.methods",
    "PromptTuningConfig": "fastpeft.methods",
    "SFTConfig": "fastpeft.trainers",
    "SFTTrainer": "fastpeft.trainers",
    "UserError": "fastpeft.errors",
    "accelerate": "fastpeft.models",
    "attach_score": "fastpeft.trainers",
    "get_peft_model": "fastpeft.methods",
    "load_pretrained": "fastpeft.models",
    "get_reward_model": "fastpeft.trainers",
    "lora_plus_groups": "fastpeft.methods",
    "quantize": "fastpeft.models",
    "restore": "fastpeft.models",
    "use_in_peft": "fastpeft.models",
}
_ROOMS = ("data", "errors", "methods", "models", "nemo", "nn", "ops", "optim", "recipes", "trainers")

__all__ = ["__version__", *sorted(_EXPORTS), *_ROOMS]  # noqa: PLE0604 (names are built from the tables above)


def __getattr__(name: str) -> Any:
    """Import a public name or room on first use."""
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"fastpeft.{name}")
    else:
        raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
