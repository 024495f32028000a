"""What a run's memory is made of, and the peak of training steps without that of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods.families import tiny
from torch import nn
from trainers.tiny import tiny_llama, tiny_lora

from fastpeft.methods import LoraConfig, get_peft_model
from fastpeft.models import quantize
from fastpeft.nn import NF4Experts, NF4Linear
from fastpeft.optim import AdamW
from fastpeft.trainers import SFTTrainer, memory
from fastpeft.trainers.memory import PeakMemory, memory_by_kind


def stepped(model: nn.Module, kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-3)  # type: ignore[call-arg]
    ids = torch.arange(4, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW])
def test_kinds_add_up(kind: type[torch.optim.Optimizer]) -> None:
    model = tiny_lora(quantized=True)
    optimizer = stepped(model, kind)
    found = memory_by_kind(model, optimizer, "cpu", peak=10_000_000)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    dense = sum(p.nbytes for p in model.parameters() if not p.requires_grad and p.dtype != torch.uint8)
    buffers = sum(b.nbytes for b in model.buffers())
    assert packed and found["weights"] == dense + buffers + sum(module.nf4.nbytes for module in packed)
    assert found["trained"] == found["gradients"] == trained
    assert 2 * trained <= found["optimizer"] <= 2 * trained + 4 * len(list(model.parameters()))
    assert sum(found.values()) == 10_000_000
    assert "activations" not in memory_by_kind(model, optimizer, "cpu", peak=None)
    assert set(memory_by_kind(model, optimizer, "cuda", peak=None).values()) == {0}, "nothing is on a GPU"


def test_packed_experts_are_counted_with_their_scales() -> None:
    model = get_peft_model(quantize(tiny("mixtral")), LoraConfig(r=4, target_modules=["q_proj"]))
    found = memory_by_kind(model, stepped(model, AdamW), "cpu", peak=None)
    experts = [module for module in model.modules() if isinstance(module, NF4Experts)]
    packed = [module.nf4 for module in model.modules() if isinstance(module, NF4Linear)]
    packed += [nf4 for module in experts for nf4 in module.packed.values()]
    dense = sum(p.nbytes for p in model.parameters() if not p.requires_grad and p.dtype != torch.uint8)
    assert len(experts) == 2
    assert found["weights"] == dense + sum(b.nbytes for b in model.buffers()) + sum(nf4.nbytes for nf4 in packed)


def test_all_weights_trained_are_no_frozen_ones() -> None:
    model = tiny_llama()
    found = memory_by_kind(model, stepped(model, AdamW), "cpu", peak=1)
    assert found["weights"] == sum(b.nbytes for b in model.buffers())
    assert found["trained"] == sum(p.nbytes for p in model.parameters()), "the tied weight once"
    assert found["activations"] == 0, "never below"


def test_an_evaluations_peak_is_not_the_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"peak": 900}
    monkeypatch.setattr(memory, "memory_bytes", lambda device: now["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: now.update(peak=100))
    peak = PeakMemory(torch.device("cuda"))
    peak.start()
    assert peak.read() == 100, "what loading took is forgotten"
    now["peak"] = 300
    with peak.apart():
        now["peak"] = 700
        assert memory.memory_bytes(torch.device("cuda")) == 700
    assert peak.read() == 300
    now["peak"] = 350
    assert peak.read() == 350


@pytest.mark.gpu
def test_a_run_on_a_gpu(make_trainer: Callable[..., SFTTrainer], rows: Any) -> None:
    options: dict[str, Any] = {"use_cpu": False, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tiny_lora(quantized=True, dtype=torch.bfloat16), eval_dataset=rows[:4], **options)
    trainer.train()
    log = trainer.state.log_history
    assert all(line["eval_memory_bytes"] > 0 for line in log if "eval_loss" in line)
    peak = trainer.peak_memory()
    assert peak is not None and peak >= max(line["memory_bytes"] for line in log if "loss" in line)
    kinds = memory_by_kind(trainer.model, trainer.optimizer, "cuda", peak)
    assert all(count > 0 for count in kinds.values()) and sum(kinds.values()) == peak
