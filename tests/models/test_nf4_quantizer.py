"""NF4Config in from_pretrained: packed while loading, one dense weight at a time, and saved as bitsandbytes saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models.families import batch, tiny
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import fastpeft
from fastpeft.errors import UserError
from fastpeft.models import NF4Config, load_pretrained, quantize
from fastpeft.nn import NF4Experts, NF4Linear


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    tiny(family, dtype).save_pretrained(folder, **options)
    return folder


def edited(folder: Path, change: Any) -> Path:
    """Change the tensors of a folder with one weight file."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return folder


def kinds(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is kind}


def assert_equal_states(first: nn.Module, second: nn.Module) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert [key for key in one if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("family", ["llama", "llama-biases", "smollm2", "gemma3", "phi3"])
def test_same_as_quantised_afterwards(family: str, tmp_path: Path, device: str) -> None:
    saved(tmp_path, family, max_shard_size="60KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config(), device_map=device)
    assert next(model.parameters()).device.type == device
    assert_equal_states(model, quantize(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device)))
    assert kinds(model, nn.Linear) == {"lm_head"} and not model.training
    assert not any(
        module.bias.requires_grad
        for module in model.modules()
        if getattr(module, "bias", None) is not None and isinstance(module, NF4Linear)
    )


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_options_reach_the_layers(double_quant: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    config = NF4Config(skip_modules=["down_proj", "layers.1"], block_size=128, double_quant=double_quant)
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path), quantization_config=config, dtype=dtype)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.nf4.block_size == 128 and layer.nf4.double_quant is double_quant and layer.nf4.dtype == dtype
    assert model.dtype == dtype
    assert kinds(model, NF4Linear) == {
        *(f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"),
        *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")),
    }


def test_gpt2s_transposed_layers_are_packed_the_right_way_round(tmp_path: Path) -> None:
    dense = tiny("gpt2", n_embd=64, n_layer=2, n_head=4).eval()
    dense.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config())
    assert model.transformer.h[0].attn.c_attn.nf4.shape == (192, 64)
    assert_equal_states(model, quantize(dense))
    inputs = batch()["input_ids"]
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name in kinds(model, NF4Linear):
        fresh.get_submodule(name).weight.data = model.get_submodule(name).dequantize().t()
    torch.testing.assert_close(model(inputs).logits, fresh(inputs).logits, rtol=1e-5, atol=1e-5)


def test_trains_adapters_under_a_trainer_that_looks_for_quantisation(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "base"), quantization_config=NF4Config())
    arguments = TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments)
    adapted = fastpeft.get_peft_model(model, fastpeft.LoraConfig(r=4, target_modules="all-linear"))
    Trainer(adapted, arguments)
    loss = adapted(**batch()).loss
    loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


# --- saving ---
def test_saves_what_it_loads(tmp_path: Path) -> None:
    config = NF4Config(skip_modules=["layers.0.mlp"], double_quant=False)
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "dense"), quantization_config=config)
    model.save_pretrained(tmp_path / "packed", max_shard_size="40KB")
    section = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "bitsandbytes" and section["bnb_4bit_quant_type"] == "nf4"
    assert section["bnb_4bit_use_double_quant"] is False and section["bnb_4bit_compute_dtype"] == "bfloat16"
    assert set(section["llm_int8_skip_modules"]) == {
        *("lm_head", *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")))
    }
    again = load_pretrained(tmp_path / "packed")
    assert_equal_states(again, model)
    again.save_pretrained(tmp_path / "third")
    assert_equal_states(load_pretrained(tmp_path / "third"), model)


def test_a_model_packed_after_loading_saves_alike(tmp_path: Path) -> None:
    """It wrote packed weights beside a config.json that did not say so, which nothing could load."""
    model = quantize(AutoModelForCausalLM.from_pretrained(saved(tmp_path / "dense")), block_size=128)
    model.save_pretrained(tmp_path / "packed")
    assert_equal_states(load_pretrained(tmp_path / "packed"), model)


def test_a_merged_model_is_saved_as_a_dense_one(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "dense"), quantization_config=NF4Config())
    adapted = fastpeft.get_peft_model(model, fastpeft.LoraConfig(r=4, target_modules="all-linear"))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert_equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), model)


def test_dequantize_gives_the_values_back(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "dense"), quantization_config=NF4Config())
    expected = model.model.layers[0].mlp.up_proj.dequantize(torch.float32)
    model.dequantize(torch.float32)
    assert kinds(model, NF4Linear) == set() and torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)
    model.float().save_pretrained(tmp_path / "again")
    assert_equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


# --- mixtures of experts ---
MIXTURES = ["mixtral", "qwen3-moe", "olmoe"]
_EXPERTS = {f"model.layers.{layer}.mlp.experts" for layer in (0, 1)}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch()["input_ids"]).logits  # type: ignore[no-any-return]


def keys_of(folder: Path) -> set[str]:
    return {key for file in folder.glob("*.safetensors") for key in safetensors.torch.load_file(file)}


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_packed_as_they_are_joined(family: str, tmp_path: Path, device: str) -> None:
    """The file has a tensor for each expert's part; it was packed when transformers had joined them, or not at all."""
    saved(tmp_path, family, max_shard_size="60KB")
    assert any(".experts.3." in key for key in keys_of(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config(), device_map=device)
    assert kinds(model, NF4Experts) == _EXPERTS
    assert next(model.model.layers[1].mlp.experts.parameters()).device.type == device
    afterwards = quantize(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device))
    assert_equal_states(model, afterwards)
    inputs = batch()["input_ids"].to(device)
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, afterwards(inputs).logits)


@pytest.mark.parametrize("packing", ["while-loading", "after-loading", "never-loaded"])
@pytest.mark.parametrize("family", MIXTURES)
def test_packed_experts_save_and_load(family: str, packing: str, tmp_path: Path) -> None:
    """transformers splits experts when it saves them; packed codes must stay whole."""
    saved(tmp_path / "dense", family)
    if packing == "while-loading":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=NF4Config(block_size=32))
    elif packing == "after-loading":
        model = quantize(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), double_quant=False)
    else:
        model = quantize(tiny(family).eval())
    expected = logits(model)
    for folder in ("first", "second"):
        model.save_pretrained(tmp_path / folder, max_shard_size="60KB")
        assert any(key.endswith("experts.gate_up_proj.absmax") for key in keys_of(tmp_path / folder))
        section = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        assert section["llm_int8_skip_modules"] == ["lm_head"]
        again = load_pretrained(tmp_path / folder)
        assert kinds(again, NF4Experts) == _EXPERTS
        assert_equal_states(again, model)
        assert torch.equal(logits(again), expected)
        model = again


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_are_skipped_save_split_beside_packed_ones(family: str, tmp_path: Path) -> None:
    config = NF4Config(["layers.0.mlp.experts"])
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "dense", family), quantization_config=config)
    assert kinds(model, NF4Experts) == {"model.layers.1.mlp.experts"}
    expected, dense = logits(model), keys_of(tmp_path / "dense")
    for folder in ("first", "second"):
        model.save_pretrained(tmp_path / folder)
        section = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        assert set(section["llm_int8_skip_modules"]) == {"lm_head", "model.layers.0.mlp.experts"}
        keys = keys_of(tmp_path / folder)
        assert {key for key in dense if "layers.0." in key and ".experts." in key} <= keys
        assert not any("layers.1." in key and ".experts.0." in key for key in keys)
        model = load_pretrained(tmp_path / folder)
        assert kinds(model, NF4Experts) == {"model.layers.1.mlp.experts"}
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("packing", ["packed-file", "never-loaded"])
def test_dequantised_experts_save_as_they_were(family: str, packing: str, tmp_path: Path) -> None:
    saved(tmp_path / "dense", family)
    model = quantize(tiny(family, torch.bfloat16))
    if packing == "packed-file":
        model.save_pretrained(tmp_path / "packed")
        model = load_pretrained(tmp_path / "packed")
    fastpeft.models.dequantize(model).save_pretrained(tmp_path / "back")
    assert keys_of(tmp_path / "back") == keys_of(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    assert_equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "back"), model)


def test_experts_of_another_form_stay_dense(tmp_path: Path) -> None:
    """gpt-oss also names modules that stay float32 in a float16 model; a bfloat16 one's were read as float32 too."""
    tiny("gpt-oss", torch.bfloat16, attn_implementation="eager").save_pretrained(tmp_path / "dense")
    model = load_pretrained(tmp_path / "dense", quantization_config=NF4Config())
    assert not kinds(model, NF4Experts) and kinds(model, NF4Linear)
    model.save_pretrained(tmp_path / "again")
    assert_equal_states(load_pretrained(tmp_path / "again"), model)


def test_a_lora_merges_over_packed_experts(tmp_path: Path) -> None:
    """Merged layers are dense then, and the experts, which the adapter does not touch, packed as before."""
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "dense", "mixtral"), quantization_config=NF4Config())
    config = fastpeft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = fastpeft.get_peft_model(model, config)
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    assert kinds(merged, NF4Experts) == _EXPERTS
    torch.testing.assert_close(logits(merged), expected, rtol=5e-2, atol=5e-2)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_pretrained(tmp_path / "merged")), logits(merged))


# --- what is refused ---
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 100}, "block_size=100; must be one of 32, 64"),
        ({"double_quant": "yes"}, "double_quant='yes'; must be True or False"),
        ({"compute_dtype": "int8"}, "compute_dtype='int8'; must be one of bfloat16, float16, float32"),
    ],
    ids=str,
)
def test_refuses_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NF4Config(**arguments)


def test_refuses_a_name_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"skip names 'down_porj', which matches no module .* did you mean 'down_proj'"):
        AutoModelForCausalLM.from_pretrained(saved(tmp_path), quantization_config=NF4Config(["down_porj"]))


def test_refuses_a_device_map_that_would_move_packed_layers() -> None:
    from fastpeft.models.nf4_quantizer import NF4Quantizer

    quantizer = NF4Quantizer(NF4Config(), pre_quantized=False)
    quantizer.validate_environment(device_map={"": "cpu"})
    quantizer.validate_environment(device_map={"a": 0, "b": 1})
    for places in ({"a": 0, "b": "cpu"}, {"a": "cpu", "b": "disk"}):
        with pytest.raises(UserError, match="the device map places modules on"):
            quantizer.validate_environment(device_map=places)


_KEY = "model.layers.1.mlp.up_proj.weight"


def _spoilt(tensors: dict[str, torch.Tensor], value: float) -> None:
    tensors[_KEY][3, 5] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: _spoilt(t, float("nan")), f"{_KEY} holds NaN or Inf"),
        (lambda t: _spoilt(t, float("inf")), f"{_KEY} holds NaN or Inf"),
        (lambda t: t.pop(_KEY), f"{_KEY} is not in the checkpoint"),
        (lambda t: t.update({_KEY: t[_KEY][:50].clone()}), rf"{_KEY} has shape \(50, 64\), the model's layer \(96, 64"),
    ],
    ids=["nan", "inf", "missing", "shape"],
)
def test_refuses_broken_weights_by_name(change: Any, message: str, tmp_path: Path) -> None:
    """transformers fills what is missing with random numbers, and packs NaN."""
    edited(saved(tmp_path), change)
    with pytest.raises(UserError, match="1 weights cannot be used:\n  " + message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config())


_EXPERT_KEY = "model.layers.1.mlp.experts.2.up_proj.weight"
_JOINED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[_EXPERT_KEY].fill_(float("nan")), f"{_JOINED} holds NaN or Inf"),
        (
            lambda t: [t.pop(key) for key in list(t) if "layers.1.mlp.experts" in key and "down" not in key],
            f"{_JOINED} is not in the checkpoint",
        ),
        (
            lambda t: [t.pop(key) for key in list(t) if "layers.1.mlp.experts.3." in key and "down" not in key],
            rf"{_JOINED} has shape \(3, 64, 64\), the model's layer \(4, 64, 64\)",
        ),
    ],
    ids=["nan", "missing", "one-expert-less"],
)
def test_refuses_broken_experts_by_name(change: Any, message: str, tmp_path: Path) -> None:
    edited(saved(tmp_path, "qwen3-moe"), change)
    with pytest.raises(UserError, match="1 weights cannot be used:\n  " + message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config())


# --- memory ---
_MEASURE = """
import sys, torch
from transformers import AutoModelForCausalLM
from fastpeft.models import NF4Config, nf4_quantizer

def anonymous():  # what this process holds of its own: mapped files do not count
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

seen, pack = [], nf4_quantizer.nf4_quantize
def watched(*arguments):
    seen.append(anonymous())
    packed = pack(*arguments)
    seen.append(anonymous())
    return packed
nf4_quantizer.nf4_quantize = watched
load = lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=NF4Config(), dtype=torch.float32)
load()  # libraries and thread pools come into memory
seen.clear()
before = anonymous()
model = load()
print(max(seen) - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_the_dense_model_is_never_in_memory(tmp_path: Path) -> None:
    """Eight layers of 42 MB (float32): the peak is what stays, plus less than two dense weights of 8 MB.

    The allocator keeps freed blocks for later, anything from none to a whole model of them; with the threshold
    set, every large block is a mapping of its own that goes back at once, and what is counted is what is held.
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8, "num_key_value_heads": 4}
    dense = tiny("llama", torch.bfloat16, **sizes)
    whole = 4 * sum(p.numel() for p in dense.parameters())
    dense.save_pretrained(tmp_path)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth, kept = map(int, done.stdout.split())
    one_weight = 4 * 2048 * 1024
    assert whole > 8 * kept / 2 and growth <= kept + 2 * one_weight < whole / 3


@pytest.mark.parametrize(("family", "weights"), [("llama", 14), ("qwen3-moe", 12)])
def test_only_one_dense_weight_is_alive_at_a_time(
    family: str, weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted exactly: the weight before is gone when the next one is packed."""
    import weakref

    from fastpeft.models import nf4_quantizer

    alive: list[weakref.ref[torch.UntypedStorage]] = []
    pack = nf4_quantizer.nf4_quantize

    def watched(value: torch.Tensor, *arguments: Any) -> Any:
        assert all(earlier() is None for earlier in alive)
        alive.append(weakref.ref(value.untyped_storage()))
        return pack(value, *arguments)

    monkeypatch.setattr(nf4_quantizer, "nf4_quantize", watched)
    # Another dtype than the file's, because a weight of the file's dtype is a view of the mapped file.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        saved(tmp_path, family), quantization_config=NF4Config(), dtype=torch.float32
    )
    assert len(alive) == weights == len(kinds(model, NF4Linear)) + 2 * len(kinds(model, NF4Experts))
