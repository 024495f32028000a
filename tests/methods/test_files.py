"""Adapter folders: exact round trips, and one clear message for every damaged or foreign one."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, PeftModel, get_peft_model
from fastpeft.methods.files import read_config, write_adapter

Make = Callable[..., nn.Module]
CONFIG = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(make_llama: Make, tmp_path: Path) -> Path:
    """A good adapter, for a test to spoil."""
    torch.manual_seed(4)
    model = get_peft_model(make_llama(), CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, how: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(how(load_file(path)), path)


def reconfigure(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def state(model: nn.Module) -> dict[str, Any]:
    return {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(
        old[:2] == after[name][:2] and torch.equal(old[2], after[name][2]) for name, old in before.items()
    )


def test_values_come_back_to_the_bit(make_llama: Make, folder: Path) -> None:
    model = PeftModel.from_pretrained(make_llama(), folder)
    saved = load_file(folder / "adapter_model.safetensors")
    assert model.adapter_state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in model.adapter_state_dict().items())


def test_loaded_frozen_or_trainable(make_llama: Make, folder: Path) -> None:
    frozen = PeftModel.from_pretrained(make_llama().train(), folder)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    model = PeftModel.from_pretrained(make_llama().train(), folder, is_trainable=True)
    assert model.training
    expected = {n for n, _ in model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected


def test_bf16_values_load_as_fp32(make_llama: Make, folder: Path) -> None:
    change(folder, lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    model = PeftModel.from_pretrained(make_llama(), folder)
    assert {t.dtype for t in model.adapter_state_dict().values()} == {torch.float32}


def test_saving_a_saved_adapter_changes_nothing(make_llama: Make, folder: Path) -> None:
    PeftModel.from_pretrained(make_llama(), folder).save_pretrained(folder / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / name).read_bytes() == (folder / "again" / name).read_bytes()


def test_only_the_main_process_writes(make_llama: Make, tmp_path: Path) -> None:
    get_peft_model(make_llama(), CONFIG).save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_values_gathered_elsewhere_are_saved(make_llama: Make, tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), CONFIG)
    gathered = {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert all((tensor == 0.5).all() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())


def test_an_interrupted_save_leaves_the_old_files(
    make_llama: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half of")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        get_peft_model(make_llama(), CONFIG).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_who_may_read_an_adapter_is_the_umasks_matter(make_llama: Make, tmp_path: Path) -> None:
    """The weights came with mode 0600 beside a configuration with 0644, so that others saw half an adapter."""
    before = os.umask(0o027)
    try:
        get_peft_model(make_llama(), CONFIG).save_pretrained(tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "adapter").iterdir()} == {0o640}


def test_saving_to_a_file_is_refused(make_llama: Make, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="it is a file; give a folder"):
        get_peft_model(make_llama(), CONFIG).save_pretrained(tmp_path / "out")


# Folders that are not an adapter, or not a whole one.


def missing_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def whole_model(folder: Path) -> None:
    missing_config(folder)
    (folder / "config.json").write_text("{}")


def in_a_subfolder(folder: Path) -> None:
    (folder / "second").mkdir()
    (folder / "adapter_config.json").rename(folder / "second" / "adapter_config.json")


def missing_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"")


def no_tensors(folder: Path) -> None:
    save_file({}, folder / "adapter_model.safetensors")


def nan_value(folder: Path) -> None:
    key = f"{PREFIX}.lora_B.weight"
    change(folder, lambda tensors: {**tensors, key: tensors[key].index_fill(0, torch.tensor(2), float("nan"))})


def inf_value(folder: Path) -> None:
    key = f"{PREFIX}.lora_A.weight"
    change(folder, lambda tensors: {**tensors, key: tensors[key].index_fill(0, torch.tensor(1), -float("inf"))})


def integers(folder: Path) -> None:
    change(folder, lambda tensors: {key: tensor.int() for key, tensor in tensors.items()})


def bad_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"r": 4,')


def json_list(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[]")


def no_type(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"r": 4}')


def other_type(folder: Path) -> None:
    reconfigure(folder, peft_type="PREFIX_TUNING")


def other_key(folder: Path) -> None:
    reconfigure(folder, lora_aplha=3)


def missing_keys(folder: Path) -> None:
    change(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if "down_proj" not in key})


def extra_keys(folder: Path) -> None:
    reconfigure(folder, target_modules=["q_proj"])


def no_prefix(folder: Path) -> None:
    change(folder, lambda tensors: {k.removeprefix("base_model.model."): tensor for k, tensor in tensors.items()})


def other_library(folder: Path) -> None:
    change(folder, lambda tensors: {f"lora_unet_{i}": tensor for i, tensor in enumerate(tensors.values())})


def adapter_name_in_keys(folder: Path) -> None:
    change(folder, lambda tensors: {k.replace("weight", "default.weight"): tensor for k, tensor in tensors.items()})


def other_rank(folder: Path) -> None:
    reconfigure(folder, r=8)


def other_base(folder: Path) -> None:
    reconfigure(folder, base_model_name_or_path="some/other-7b")
    change(
        folder,
        lambda tensors: {
            key: torch.zeros(4, 128) if "q_proj.lora_A" in key else tensor for key, tensor in tensors.items()
        },
    )


def other_vocabulary(folder: Path) -> None:
    change(folder, lambda tensors: {**tensors, "base_model.model.lm_head.weight": torch.zeros(100, 64)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_config, r"no adapter_config\.json in this folder; it holds adapter_model\.safetensors"),
        (whole_model, r"it holds a whole model; give it as the model \(model\.path; in Python: Auto"),
        (in_a_subfolder, "there are adapters in its subfolders second; give one of these"),
        (missing_weights, r"no adapter_model\.safetensors beside adapter_config\.json; the folder holds"),
        (pickle_only, r"adapter_model\.bin, a pickle, which can run code"),
        (cut_weights, r"adapter_model\.safetensors: not a whole safetensors file"),
        (empty_weights, "not a whole safetensors file"),
        (no_tensors, "holds no tensor"),
        (nan_value, rf"1 of 9 tensors hold NaN or Inf: {PREFIX}\.lora_B\.weight; the training run diverged"),
        (inf_value, r"hold NaN or Inf: .*q_proj\.lora_A\.weight"),
        (integers, r"is torch\.int32; adapter weights are floating-point"),
        (bad_json, r"adapter_config\.json: not valid JSON \(.*line 1"),
        (json_list, "holds a list; needs an object"),
        (no_type, "no key 'peft_type'"),
        (other_type, r"adapter_config\.json: peft_type is 'PREFIX_TUNING'; this version has LORA, IA3"),
        (other_key, r"unknown key 'lora_aplha'; did you mean 'lora_alpha'"),
        (
            missing_keys,
            r"missing in the file \(4\): .*down_proj\.lora_A\.weight(.|\n)*\(In Python: strict=False loads what fits",
        ),
        (extra_keys, r"without a place in the model \(4\): .*down_proj\.lora_A\.weight"),
        (no_prefix, r"the file's keys lack the prefix 'base_model\.model\.': they were saved from the inner model"),
        (other_library, r"without a place in the model \(9\)(.|\n)*another library wrote it"),
        (adapter_name_in_keys, r"the file's keys hold an adapter's name \('lora_A\.default\.weight'\)"),
        (
            other_rank,
            r"is \(4, 128\) in the file, \(8, 128\) in the model(.|\n)*rank is 4 where adapter_config\.json says 8",
        ),
        (
            other_base,
            r"is \(4, 128\) in the file, \(4, 64\) in the model(.|\n)*base model of other sizes: load 'some/oth",
        ),
        (other_vocabulary, r"call model\.resize_token_embeddings\(100\) on the base model first"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_folder_is_one_message_and_the_model_stays(
    make_llama: Make, folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    model = make_llama()
    before = state(model)
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(model, folder)
    assert same(before, state(model))


def test_no_such_folder_and_a_file(make_llama: Make, folder: Path) -> None:
    with pytest.raises(UserError, match=r"there is no such folder\. An adapter from a hub must be downloaded first"):
        PeftModel.from_pretrained(make_llama(), "someone/adapter")
    with pytest.raises(UserError, match="it is a file; give the folder"):
        PeftModel.from_pretrained(make_llama(), folder / "adapter_model.safetensors")


def test_targets_the_model_lacks_do_not_matter_in_a_file(make_llama: Make, folder: Path) -> None:
    """PEFT writes every name it was given, and a file's tensors say what belongs to the adapter."""
    reconfigure(folder, target_modules=["q_proj", "down_proj", "query_key_value"], rank_pattern={"c_attn": 2})
    assert isinstance(PeftModel.from_pretrained(make_llama(), folder), PeftModel)


@pytest.mark.parametrize("spoil", [missing_keys, extra_keys, other_rank])
def test_not_strict_loads_what_fits_and_says_what_not(
    make_llama: Make, folder: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(folder)
    with pytest.warns(UserWarning, match="was loaded in part:(.|\n)*lora_A.weight"):
        model = PeftModel.from_pretrained(make_llama(), folder, strict=False)
    saved = load_file(folder / "adapter_model.safetensors")
    fitting = [k for k, t in model.adapter_state_dict().items() if k in saved and saved[k].shape == t.shape]
    assert fitting
    assert all(torch.equal(model.adapter_state_dict()[key], saved[key]) for key in fitting)


def test_not_strict_still_refuses_nan(make_llama: Make, folder: Path) -> None:
    nan_value(folder)
    with pytest.raises(UserError, match="NaN or Inf"):
        PeftModel.from_pretrained(make_llama(), folder, strict=False)


# Loading into a model that has adapters.


def test_load_adapter_adds_one(make_llama: Make, folder: Path) -> None:
    model = get_peft_model(make_llama(), LoraConfig())
    report = model.load_adapter(folder, "saved")
    assert report.complete and len(report.loaded) == 9 and model.active_adapter == "default"
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".saved." in name)
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[key]) for key, tensor in model.adapter_state_dict("saved").items())


def test_a_failed_load_adapter_leaves_the_model(make_llama: Make, folder: Path) -> None:
    missing_keys(folder)
    model = get_peft_model(make_llama(), LoraConfig())
    before = state(model)
    with pytest.raises(UserError, match=r"missing in the file \(4\)"):
        model.load_adapter(folder, "saved")
    assert list(model.peft_config) == ["default"]
    assert same(before, state(model))


def test_load_adapter_weights_overwrites_in_place(make_llama: Make, folder: Path) -> None:
    model = get_peft_model(make_llama(), CONFIG)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert model.load_adapter_weights(folder).complete
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[key]) for key, tensor in model.adapter_state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_keys, r"missing in the file \(4\)"),
        (nan_value, "NaN or Inf"),
        (lambda folder: reconfigure(folder, lora_alpha=64), r"was trained with lora_alpha 64 \(here 8\)"),
        (other_rank, r"was trained with r 8 \(here 4\)"),
    ],
    ids=["missing", "nan", "alpha", "rank"],
)
def test_a_failed_load_adapter_weights_changes_nothing(
    make_llama: Make, folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    model = get_peft_model(make_llama(), CONFIG)
    before = state(model)
    with pytest.raises(UserError, match=message):
        model.load_adapter_weights(folder)
    assert same(before, state(model))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Setting `save_embedding_layers`")
def test_an_embedding_that_peft_saved_replaces_the_models(make_llama: Make, tmp_path: Path) -> None:
    """After resizing the vocabulary PEFT saves embedding and head with the adapter; a load must not drop them."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = make_llama()
    base.resize_token_embeddings(100)
    theirs = peft.get_peft_model(base, peft.LoraConfig())
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    resized = make_llama(seed=7)
    resized.resize_token_embeddings(100)
    ours = PeftModel.from_pretrained(resized, tmp_path)
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(ours, getter)().weight, getattr(theirs, getter)().weight)
    with pytest.raises(UserError, match=r"call model\.resize_token_embeddings\(100\)"):
        PeftModel.from_pretrained(make_llama(), tmp_path)


def test_write_adapter_copies_shared_memory(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    write_adapter(tmp_path, LoraConfig().to_dict(), {"a": weight, "b": weight.t()})
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["a"], weight) and torch.equal(saved["b"], weight.t())
    assert read_config(tmp_path) == LoraConfig()
