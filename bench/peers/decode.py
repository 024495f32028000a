"""The peers' decoding: transformers' ``generate`` over bitsandbytes' layers.

hf          its dynamic cache, the default
hf-static   its static cache
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import require
from bench.decode import DecodeSetup, Decoding, shake_adapters
from bench.peers.train_step import bitsandbytes_model


def _hf(setup: DecodeSetup, cache: str | None) -> Decoding:
    model = bitsandbytes_model(setup).eval()
    if setup.adapter:
        peft = require("peft")
        config = peft.LoraConfig(r=setup.rank, lora_alpha=32, target_modules=setup.projections)
        model = peft.get_peft_model(model, config)
        shake_adapters(model.eval())
    model.config.use_cache = True
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}

    @torch.no_grad()
    def generate(ids: Tensor, new_tokens: int) -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=setup.model_config().pad_token_id,
            **options,
        )

    return Decoding(generate, f"{cache or 'dynamic'} cache")


STACKS: dict[str, Callable[[DecodeSetup], Decoding]] = {
    "hf": partial(_hf, cache=None),
    "hf-static": partial(_hf, cache="static"),
}
