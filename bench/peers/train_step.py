"""The peers' training steps, each set up as its documentation says: a model of the same shape, ready to train.

hf       transformers, bitsandbytes and PEFT, torch's gradient checkpointing
liger    the same with Liger's kernels
unsloth  Unsloth with its offloaded checkpointing, ``unsloth-gc`` with its plain one
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.case import require
from bench.step import Setup, Stack, empty_model, word_tokenizer


def bitsandbytes_model(setup: Setup) -> Any:
    """A model whose linear layers but the last are bitsandbytes' NF4, double-quantised; experts stay dense."""
    bnb = require("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=setup.device).normal_(std=0.02)
        layer: nn.Module = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        packed = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4", blocksize=64
        )
        layer.weight = packed.to(setup.device)
        return layer

    model = empty_model(setup, make)
    model.is_loaded_in_4bit = True  # as `from_pretrained` marks it; PEFT chooses its layer by it
    return model


def _hf(setup: Setup, liger: bool) -> Stack:
    peft, bnb = require("peft"), require("bitsandbytes")
    if liger:
        require("liger_kernel")
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
    model = bitsandbytes_model(setup)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    config = peft.LoraConfig(
        r=setup.rank,
        lora_alpha=32,
        lora_dropout=setup.dropout,
        target_modules=setup.projections,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    model.train()
    return Stack(model, _paged_adamw(bnb, trained, setup), autocast=True, note="gradient checkpointing")


def _paged_adamw(bnb: Any, trained: list[Any], setup: Setup) -> torch.optim.Optimizer:
    """The paged AdamW, of bitsandbytes, which QLoRA recipes name; on a CPU torch's."""
    if setup.device == "cpu":
        return torch.optim.AdamW(trained, lr=1e-4)
    optimizer: torch.optim.Optimizer = bnb.optim.PagedAdamW32bit(trained, lr=1e-4)
    return optimizer


def _unsloth(setup: Setup, checkpointing: str | bool) -> Stack:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    unsloth, bnb = require("unsloth"), require("bitsandbytes")
    folder = _saved_llama(setup)
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=setup.tokens, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=setup.rank,
        lora_alpha=32,
        lora_dropout=setup.dropout,
        bias="none",
        target_modules=setup.projections,
        use_gradient_checkpointing=checkpointing,
    )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    note = "its offloaded checkpointing" if checkpointing == "unsloth" else "its plain checkpointing"
    return Stack(model, _paged_adamw(bnb, trained, setup), autocast=True, note=note)


def _saved_llama(setup: Setup) -> Path:
    """A folder with a random model of the shape, which Unsloth reads: it takes paths, no models."""
    from transformers import LlamaForCausalLM

    name = "-".join(str(n) for n in (setup.layers, setup.hidden, setup.intermediate, setup.heads, setup.vocab))
    folder = Path(tempfile.gettempdir()) / f"fastpeft-bench-llama-{name}"
    if (folder / "tokenizer.json").exists():
        return folder
    torch.manual_seed(setup.seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(setup.device):
        model = LlamaForCausalLM(setup.model_config())
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    del model
    if setup.device == "cuda":
        torch.cuda.empty_cache()
    word_tokenizer(setup).save_pretrained(folder)
    return folder


STACKS: dict[str, Callable[[Setup], Stack]] = {
    "hf": partial(_hf, liger=False),
    "liger": partial(_hf, liger=True),
    "unsloth": partial(_unsloth, checkpointing="unsloth"),
    "unsloth-gc": partial(_unsloth, checkpointing=True),
}
