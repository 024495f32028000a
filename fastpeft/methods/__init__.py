"""Methods: what to train, and the files that hold it.

``get_peft_model(model, LoraConfig(...))`` freezes a model and adds a trainable adapter; ``PeftModel.from_pretrained``
and ``save_pretrained`` read and write adapters in PEFT's layout.
"""

from fastpeft.methods.config import LoraConfig
from fastpeft.methods.files import LoadReport
from fastpeft.methods.model import PeftModel, get_peft_model

__all__ = ["LoadReport", "LoraConfig", "PeftModel", "get_peft_model"]
