"""Adapter folders of every method: one clear message for every damaged or foreign one, and the model stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.families import METHODS, logits, moved, tiny, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, PeftModel, get_peft_model
from fastpeft.methods.files import read_config

KINDS = ["dora", "pissa", "shared-a", "ia3", "prompt", "p-tuning-mlp", "houlsby"]
kinds = pytest.mark.parametrize("name", KINDS)
Tensors = dict[str, Tensor]


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(2)
    moved(get_peft_model(tiny(), METHODS[name])).save_pretrained(folder)
    return folder


def weights_file(folder: Path) -> Path:
    return next(folder.glob("adapter*.safetensors"))


def config_file(folder: Path) -> Path:
    return next(iter([*folder.glob("adapter_config.json"), *folder.glob("fastpeft_adapter.json")]))


def change(folder: Path, how: Callable[[Tensors], Tensors]) -> None:
    save_file(how(load_file(weights_file(folder))), weights_file(folder))


def reconfigure(folder: Path, **values: Any) -> None:
    file = config_file(folder)
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder: Path, message: str, model: nn.Module | None = None) -> None:
    model = tiny() if model is None else model
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    values = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(model, folder)
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


@kinds
def test_missing_and_extra_keys(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    first = next(iter(load_file(weights_file(tmp_path))))
    change(tmp_path, lambda tensors: {("other" if key == first else key): t for key, t in tensors.items()})
    refused(tmp_path, r"missing in the file \(1\): .*\n.*without a place in the model \(1\): other")
    with pytest.warns(UserWarning, match="was loaded in part"):
        loaded = PeftModel.from_pretrained(tiny(), tmp_path, strict=False)
    assert loaded.adapter_state_dict().keys() >= load_file(weights_file(tmp_path)).keys() - {"other"}


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(name: str, value: float, tmp_path: Path) -> None:
    saved(name, tmp_path)

    def spoil(tensors: Tensors) -> Tensors:
        next(iter(tensors.values())).view(-1)[0] = value
        return tensors

    change(tmp_path, spoil)
    refused(tmp_path, "hold NaN or Inf")


@kinds
def test_a_base_of_another_shape(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    refused(tmp_path, "another base|other sizes|of another shape", tiny(hidden_size=32))


@kinds
def test_pickles_unknown_keys_and_damage(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    reconfigure(tmp_path, inference_mod=True)
    refused(tmp_path, r"unknown key 'inference_mod'; did you mean 'inference_mode'")
    saved(name, tmp_path)
    whole = weights_file(tmp_path).read_bytes()
    weights_file(tmp_path).write_bytes(whole[:-9])
    refused(tmp_path, "not a whole safetensors file")
    weights_file(tmp_path).rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, "a pickle, which can run code")


@kinds
def test_a_folder_of_another_method_is_refused_where_one_is_resumed(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    other = "ia3" if name != "ia3" else "prompt"
    model = get_peft_model(tiny(), METHODS[other])
    with pytest.raises(UserError, match=f"is of kind {METHODS[name].PEFT_TYPE} and 'default' of kind"):
        model.load_adapter_weights(tmp_path)


def test_numbers_that_differ_between_the_files(tmp_path: Path) -> None:
    saved("prompt", tmp_path)
    reconfigure(tmp_path, num_virtual_tokens=7)
    refused(tmp_path, "the file has 5 virtual tokens where adapter_config.json says 7")
    saved("dora", tmp_path)
    reconfigure(tmp_path, r=7)
    refused(tmp_path, "rank is 4 where adapter_config.json says 7")
    saved("dora", tmp_path)
    reconfigure(tmp_path, use_dora=False)
    refused(tmp_path, r"without a place in the model \(14\): .*lora_magnitude_vector")


def test_names_of_adapters_in_keys(tmp_path: Path) -> None:
    saved("ia3", tmp_path)
    change(tmp_path, lambda tensors: {f"{key}.default": tensor for key, tensor in tensors.items()})
    refused(tmp_path, "the file's keys hold an adapter's name")


def test_one_a_for_several_layers_must_be_one(tmp_path: Path) -> None:
    saved("shared-a", tmp_path)

    def spoil(tensors: Tensors) -> Tensors:
        tensors[next(key for key in tensors if "v_proj.lora_A" in key)] += 1
        return tensors

    change(tmp_path, spoil)
    refused(tmp_path, "differ in the file, and this adapter trains one A for both")
    (tmp_path / "fastpeft.json").unlink()
    assert isinstance(PeftModel.from_pretrained(tiny(), tmp_path), PeftModel)


def test_a_scale_that_differs_is_refused_where_one_is_resumed(tmp_path: Path) -> None:
    saved("houlsby", tmp_path)
    reconfigure(tmp_path, scaling=2.0)
    model = get_peft_model(tiny(), METHODS["houlsby"])
    with pytest.raises(UserError, match=r"trained with scaling 2.0 \(here 1.0\)"):
        model.load_adapter_weights(tmp_path)


def test_names_of_weights_are_adapterhubs(tmp_path: Path) -> None:
    saved("pfeiffer", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fastpeft_adapter.json", "adapter.safetensors"}
    part = "model.layers.1.output_adapters.adapters.default."
    keys = {key.removeprefix(part) for key in load_file(tmp_path / "adapter.safetensors") if key.startswith(part)}
    assert keys == {
        *(f"{layer}.{kind}" for layer in ("adapter_down.0", "adapter_up") for kind in ("weight", "bias")),
        *(f"adapter_norm_{place}.{kind}" for place in ("before", "after") for kind in ("weight", "bias")),
    }


def test_bottlenecks_load_under_another_name(tmp_path: Path) -> None:
    """AdapterHub's keys hold the adapter's name."""
    saved("pfeiffer", tmp_path)
    expected = logits(PeftModel.from_pretrained(tiny(), tmp_path), tokens())
    other = PeftModel.from_pretrained(tiny(), tmp_path, adapter_name="other")
    assert torch.equal(logits(other, tokens()), expected)


def test_configurations_are_read_by_kind(tmp_path: Path) -> None:
    for name in KINDS:
        folder = saved(name, tmp_path / name)
        assert type(read_config(folder)) is type(METHODS[name])
    assert isinstance(read_config(tmp_path / "dora"), LoraConfig)
