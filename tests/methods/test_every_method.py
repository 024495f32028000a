"""What holds for every method: it trains, it is saved and loaded to the bit, it is off when it is off, it merges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.families import FAMILIES, METHODS, NO_MERGE, logits, moved, tiny, tokens, train
from torch import nn

from fastpeft.methods import AdapterConfig, PeftModel, get_peft_model
from fastpeft.models import quantize

MERGED = {"rtol": 1e-4, "atol": 1e-5}  # fp32, another order of sums
methods = pytest.mark.parametrize("name", list(METHODS))
families = pytest.mark.parametrize("family", list(FAMILIES))


def base(family: str, quantised: bool = False) -> nn.Module:
    model = tiny(family)
    return quantize(model) if quantised else model


def make(name: str, family: str = "llama", quantised: bool = False) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(base(family, quantised), METHODS[name])


# Variants of one layer differ in none of the families; each kind of place is tried in all of them.
PLACES = ["lora", "dora", "ia3", "prompt", "p-tuning-mlp", "houlsby", "parallel"]


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in METHODS for family in FAMILIES if family == "llama" or name in PLACES],
)
def test_trains_saves_loads_and_is_off(name: str, family: str, tmp_path: Path) -> None:
    model, ids = make(name, family), tokens()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    expected = logits(model, ids)
    assert expected.shape == (*ids.shape, 96)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(base(family), ids))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(family), tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


@methods
def test_trains_saves_and_loads_on_nf4(name: str, tmp_path: Path) -> None:
    model, ids = make(name, quantised=True), tokens()
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base("llama", True), tmp_path), ids), logits(model, ids))


@methods
def test_goes_on_from_its_files_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    """PEFT's P-tuning begins anew with a random encoder, because its files do not hold one."""
    whole, ids = make(name), tokens()
    train(whole, ids, seed=3)
    whole.save_pretrained(tmp_path)
    losses = train(whole, ids, seed=4)
    again = make(name)
    again.load_adapter_weights(tmp_path)
    assert train(again, ids, seed=4) == losses
    loaded = PeftModel.from_pretrained(base("llama"), tmp_path, is_trainable=True)
    assert train(loaded, ids, seed=4) == losses


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith(NO_MERGE)])
def test_merged_equals_unmerged(name: str, quantised: bool) -> None:
    model, ids = moved(make(name, quantised=quantised)), tokens()
    expected = logits(model, ids)
    assert not torch.allclose(expected, logits(base("llama", quantised), ids), atol=1e-3)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, ids), expected, **MERGED)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    merged = model.merge_and_unload()
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in tiny().named_parameters()}
    torch.testing.assert_close(logits(merged, ids), expected, **MERGED)


@families
@pytest.mark.parametrize("name", ["lora", "ia3", "dora"])
def test_merges_in_every_family(name: str, family: str) -> None:
    model, ids = moved(make(name, family)), tokens()
    expected = logits(model, ids)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), expected, **MERGED)


@methods
def test_unload_gives_the_base_back(name: str) -> None:
    model, ids = moved(make(name)), tokens()
    plain = model.unload()
    assert list(plain.state_dict()) == list(tiny().state_dict())
    assert not any(module._forward_hooks for module in plain.modules())
    assert torch.equal(logits(plain, ids), logits(tiny(), ids))
    assert isinstance(get_peft_model(plain, METHODS[name]), PeftModel)


@methods
def test_a_saved_configuration_is_the_configuration(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    one, other = (vars(m.peft_config["default"]) for m in (model, loaded))
    assert {**one, "base_model_name_or_path": None} == {**other, "base_model_name_or_path": None}


@methods
def test_a_failed_attempt_leaves_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}

    def fails(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(PeftModel, "_sync", fails)
    with pytest.raises(torch.OutOfMemoryError):
        get_peft_model(model, METHODS[name])
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@methods
def test_on_a_gpu_in_bf16(name: str, quantised: bool, tmp_path: Path) -> None:
    def on_gpu() -> nn.Module:
        model = tiny().to(device="cuda", dtype=torch.bfloat16)
        return quantize(model) if quantised else model

    ids = tokens().cuda()
    torch.manual_seed(2)
    model = get_peft_model(on_gpu(), METHODS[name])
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, ids, steps=8)
    assert losses[-1] < losses[0]
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(on_gpu(), tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    answer = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert answer.shape[0] == 2 and torch.equal(answer[:, :11], ids)
    mixed = logits(loaded, ids, adapter_names=["default", None]) if "prompt" not in name and "p-t" not in name else None
    if mixed is not None:
        torch.testing.assert_close(mixed[0], expected[0], rtol=0.05, atol=0.05)
    if not name.startswith(NO_MERGE):
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(logits(merged, ids), expected, rtol=0.05, atol=0.1)


def test_configurations_are_of_one_kind() -> None:
    assert all(isinstance(config, AdapterConfig) for config in METHODS.values())
