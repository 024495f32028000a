"""Methods: what to train, and the files that hold it.

``get_peft_model(model, config)`` freezes a model and adds a trainable adapter, of the kind that the configuration says;
``PeftModel.from_pretrained`` and ``save_pretrained`` read and write adapters in PEFT's layout.
"""

from fastpeft.methods.bottleneck import BottleneckAdapterConfig
from fastpeft.methods.causal_lm import PeftModelForCausalLM, get_peft_model
from fastpeft.methods.config_base import AdapterConfig
from fastpeft.methods.files import LoadReport
from fastpeft.methods.full import FullConfig
from fastpeft.methods.ia3 import IA3Config
from fastpeft.methods.lora_config import LoraConfig
from fastpeft.methods.lora_plus import lora_plus_groups
from fastpeft.methods.model import PeftModel
from fastpeft.methods.nemo import load_nemo_adapter
from fastpeft.methods.prompts import PromptEncoderConfig, PromptTuningConfig

__all__ = [
    "AdapterConfig",
    "BottleneckAdapterConfig",
    "FullConfig",
    "IA3Config",
    "LoadReport",
    "LoraConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "get_peft_model",
    "load_nemo_adapter",
    "lora_plus_groups",
]
