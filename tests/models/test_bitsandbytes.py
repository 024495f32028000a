"""Checkpoints of bitsandbytes, both ways and to the bit; bitsandbytes itself is imported by transformers only."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models.families import batch, tiny
from models.test_nf4_quantizer import assert_equal_states, edited, kinds
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from fastpeft.errors import UserError
from fastpeft.models import NF4Config, load_pretrained, quantize
from fastpeft.nn import NF4Experts, NF4Linear
from fastpeft.nn.experts import is_experts

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes, which is not installed"
)
_LAYER = "model.layers.1.mlp.up_proj"


def written_by_transformers(folder: Path, family: str = "llama", **options: Any) -> PreTrainedModel:
    """Pack a tiny bfloat16 model with bitsandbytes and save it in ``folder / "bnb"``."""
    tiny(family, torch.bfloat16).save_pretrained(folder / "dense")
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    model.save_pretrained(folder / "bnb", max_shard_size="40KB")
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in _load(file).items()}


def _load(file: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(file)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A folder written here."""
    quantize(tiny("llama", torch.bfloat16)).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def reconfigured(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))
    return folder


# --- bitsandbytes to fastpeft ---
@needs_bitsandbytes
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama-biases", {"bnb_4bit_use_double_quant": False}),
        ("smollm2", {"bnb_4bit_compute_dtype": torch.bfloat16}),
        ("llama", {"bnb_4bit_compute_dtype": torch.float16, "bnb_4bit_quant_storage": torch.bfloat16}),
        ("llama", {"llm_int8_skip_modules": ["lm_head", "down_proj"]}),
        ("gemma3", {}),
    ],
    ids=["nested", "biases-plain", "tied-bf16", "fp16-stored-as-bf16", "skip", "gemma3"],
)
def test_reads_what_transformers_wrote(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = written_by_transformers(tmp_path, family, **options)
    model = load_pretrained(tmp_path / "bnb")
    assert kinds(model, NF4Linear) == {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    for name in kinds(model, NF4Linear):
        ours, other = model.get_submodule(name), theirs.get_submodule(name)
        state = other.weight.quant_state
        assert torch.equal(ours.nf4.codes.flatten(), other.weight.data.view(torch.uint8).flatten())
        assert torch.equal(ours.nf4.absmax, state.absmax) and ours.nf4.dtype == state.dtype
        assert ours.nf4.double_quant == state.nested
        if state.nested:
            assert torch.equal(ours.nf4.nested_absmax, state.state2.absmax) and ours.nf4.offset == state.offset
    others = {name: value for name, value in theirs.named_parameters() if value.is_floating_point()}
    mine = dict(model.named_parameters())
    assert all(
        torch.equal(mine[name], value)
        for name, value in others.items()
        if "weight" not in name or (name in mine and mine[name].is_floating_point())
    )


@needs_bitsandbytes
def test_writes_the_bytes_that_bitsandbytes_writes(tmp_path: Path) -> None:
    written_by_transformers(tmp_path)
    load_pretrained(tmp_path / "bnb").save_pretrained(tmp_path / "ours")
    theirs, ours = tensors_of(tmp_path / "bnb"), tensors_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if "quant_state" in key:
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(value.tolist()))
        else:
            assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


@needs_bitsandbytes
def test_packs_gpt2s_transposed_layers_as_bitsandbytes_does(tmp_path: Path) -> None:
    theirs = written_by_transformers(tmp_path, "gpt2")
    model = load_pretrained(tmp_path / "bnb")
    state = theirs.transformer.h[0].mlp.c_fc.weight
    assert torch.equal(model.transformer.h[0].mlp.c_fc.nf4.codes, state.data)
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=NF4Config())
    assert_equal_states(here, model)


def test_reads_and_writes_without_bitsandbytes(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = load_pretrained(packed)
    assert isinstance(model.get_submodule(_LAYER), NF4Linear)
    model.save_pretrained(tmp_path / "again")


# --- fastpeft to bitsandbytes ---
@needs_bitsandbytes
@pytest.mark.parametrize(
    "config",
    [
        NF4Config(),
        NF4Config(double_quant=False),
        NF4Config(block_size=128),
        NF4Config(["layers.0.mlp", "o_proj"], compute_dtype=torch.float32),
    ],
    ids=["nested", "plain", "block-128", "skip"],
)
def test_transformers_reads_what_is_written_here(config: NF4Config, tmp_path: Path) -> None:
    tiny("llama-biases", torch.bfloat16, intermediate_size=128).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    names = {name for name, module in theirs.named_modules() if type(module).__name__ == "Linear4bit"}
    assert names == kinds(model, NF4Linear)
    for name in names:
        ours, state = model.get_submodule(name).nf4, theirs.get_submodule(name).weight.quant_state
        assert torch.equal(ours.codes, theirs.get_submodule(name).weight.data) and torch.equal(
            ours.absmax, state.absmax
        )
        assert state.blocksize == config.block_size and state.nested == config.double_quant
    wanted = config.compute_dtype or torch.bfloat16
    assert {theirs.get_submodule(name).compute_dtype for name in names} == {wanted}
    if config.block_size != 64:
        return  # bitsandbytes' product on the CPU wants rows of whole blocks
    inputs = batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(inputs).logits, model(inputs).logits, rtol=5e-2, atol=5e-2)


# --- what a configuration may say ---
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "packed by bitsandbytes as FP4; fastpeft reads NF4 only: load the model that"),
        (
            {"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True},
            "packed by bitsandbytes in 8 bits; fastpeft reads its 4-bit NF4 only",
        ),
        (
            {"quant_method": "gptq", "load_in_4bit": False},
            "packed by 'gptq'; fastpeft reads bitsandbytes' 4-bit NF4 only",
        ),
    ],
    ids=["fp4", "8-bit", "gptq"],
)
def test_refuses_other_packings(changes: dict[str, Any], message: str, packed: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_pretrained(reconfigured(packed, **changes))


def test_a_layer_that_the_file_holds_dense_stays_dense(packed: Path) -> None:
    """The file's tensors decide, not the names in config.json."""

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{_LAYER}.weight")]:
            del tensors[key]
        tensors[f"{_LAYER}.weight"] = torch.full((96, 64), 0.5)

    model = load_pretrained(edited(packed, unpack))
    layer = model.get_submodule(_LAYER)
    assert type(layer) is nn.Linear and torch.equal(layer.weight, torch.full((96, 64), 0.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("key", ["norm.weight", "embed_tokens.weight"])
def test_dense_weights_come_in_the_dtype_asked_for(key: str, packed: Path) -> None:
    model = load_pretrained(packed, dtype=torch.float16)
    assert model.get_parameter(f"model.{key}").dtype == torch.float16
    assert model.get_submodule(_LAYER).nf4.dtype == torch.bfloat16


def test_a_file_that_is_packed_already_is_taken_as_it_is(packed: Path) -> None:
    with pytest.warns(UserWarning, match="is packed already; it is taken as it is"):
        model = load_pretrained(packed, quantization_config=NF4Config(block_size=128))
    assert model.get_submodule(_LAYER).nf4.block_size == 64


def _without(*keys: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in keys:
            del tensors[f"{_LAYER}.{key}"]

    return change


def _with(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{_LAYER}.{key}": make(tensors[f"{_LAYER}.{key}"])})


_STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("weight.absmax"), r"no tensor 'weight\.absmax'"),
        (_without("weight.nested_absmax"), r"no tensor 'weight\.nested_absmax'"),
        (_without(_STATE), r"no tensor 'weight\.quant_state"),
        (
            _without("weight.absmax", "weight.nested_absmax", "weight.quant_map", "weight.nested_quant_map", _STATE),
            "is packed, but its scales",
        ),
        (_with("weight", lambda t: t[:-64].clone()), "codes has 3008 elements; a weight of shape"),
        (_with("weight.nested_absmax", lambda t: t * float("nan")), "its scales hold NaN or Inf"),
        (_with(_STATE, lambda t: t[:9].clone()), "Unterminated string"),
        (
            _with(_STATE, lambda t: _edit_state(t, shape=[64, 96])),
            r"has shape \(64, 96\), the model's layer \(96, 64\)",
        ),
        (_with(_STATE, lambda t: _edit_state(t, quant_type="fp4")), "is of type 'fp4', not 'nf4'"),
    ],
    ids=["no-absmax", "no-nested", "no-state", "codes-alone", "codes-cut", "nan", "state-cut", "shape", "type"],
)
def test_refuses_broken_tensors_by_name(change: Any, message: str, packed: Path) -> None:
    with pytest.raises(UserError, match=rf"1 weights cannot be used:\n  {_LAYER}\.weight.*{message}"):
        load_pretrained(edited(packed, change))


def _edit_state(stored: torch.Tensor, **changes: Any) -> torch.Tensor:
    facts = {**json.loads(bytes(stored.tolist())), **changes}
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


# --- experts ---
_EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def packed_mixture(tmp_path: Path) -> Path:
    """A folder with packed experts, written here."""
    quantize(tiny("qwen3-moe", torch.bfloat16)).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


@needs_bitsandbytes
def test_reads_experts_that_bitsandbytes_packed(tmp_path: Path) -> None:
    """Written by bitsandbytes' own functions: linear layers by transformers, and experts as parametrised parameters."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    theirs = written_by_transformers(tmp_path, "qwen3-moe")
    for name, module in list(theirs.named_modules()):
        if name.endswith(".experts"):
            for parameter in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(module, parameter, compress_statistics=True, quant_type="nf4")
    theirs._weight_conversions = []
    theirs.save_pretrained(tmp_path / "bnb", save_original_format=False)
    ours = load_pretrained(tmp_path / "bnb")
    assert {name for name, m in ours.named_modules() if isinstance(m, NF4Experts)} == {
        f"model.layers.{layer}.mlp.experts" for layer in (0, 1)
    }
    assert_equal_states(ours, quantize(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")))


@needs_bitsandbytes
def test_transformers_refuses_packed_experts_and_reads_dense_ones(tmp_path: Path) -> None:
    """Its loader packs linear layers alone; a mixture for it is packed with ``skip=["experts"]``."""
    quantize(tiny("mixtral", torch.bfloat16)).save_pretrained(tmp_path / "packed")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    model = quantize(tiny("mixtral", torch.bfloat16).eval(), skip=["experts"])
    model.save_pretrained(tmp_path / "dense-experts")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense-experts")
    inputs = batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(inputs).logits, model(inputs).logits, rtol=5e-2, atol=5e-2)


def test_experts_that_the_file_holds_dense_stay_dense(packed_mixture: Path) -> None:
    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{_EXPERTS}.")]:
            del tensors[key]
        tensors[f"{_EXPERTS}.gate_up_proj"] = torch.full((4, 64, 64), 0.5)
        tensors[f"{_EXPERTS}.down_proj"] = torch.full((4, 64, 32), 0.5)

    model = load_pretrained(edited(packed_mixture, unpack))
    experts = model.get_submodule(_EXPERTS)
    assert is_experts(experts) and torch.equal(experts.down_proj, torch.full((4, 64, 32), 0.5, dtype=torch.bfloat16))
    assert isinstance(model.model.layers[0].mlp.experts, NF4Experts)


def _drop(*keys: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [tensors.pop(f"{_EXPERTS}.{key}") for key in keys] and None


def _swap(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{_EXPERTS}.{key}": make(tensors[f"{_EXPERTS}.{key}"])})


_EXPERT_STATE = "down_proj.quant_state.bitsandbytes__nf4"
_DOWN_SCALES = tuple(f"down_proj.{key}" for key in ("absmax", "nested_absmax", "quant_map", "nested_quant_map"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("down_proj.absmax"), r"down_proj: .*no tensor 'down_proj\.absmax'"),
        (_drop("gate_up_proj.nested_absmax"), r"gate_up_proj: .*no tensor 'gate_up_proj\.nested_absmax'"),
        (
            _drop(*_DOWN_SCALES, _EXPERT_STATE),
            r"down_proj is packed, but its scales \(down_proj\.absmax, \.\.\.\) are missing",
        ),
        (_drop("down_proj", *_DOWN_SCALES, _EXPERT_STATE), r"down_proj is dense or missing, and .*gate_up_proj packed"),
        (_swap("down_proj", lambda t: t[:-64].clone()), "down_proj: .*codes has 4032 elements"),
        (_swap("down_proj.nested_absmax", lambda t: t * float("nan")), "down_proj: its scales hold NaN or Inf"),
        (
            _swap(_EXPERT_STATE, lambda t: _edit_state(t, shape=[4, 32, 64])),
            r"down_proj has shape \(4, 32, 64\), the model's layer \(4, 64, 32\)",
        ),
        (_swap(_EXPERT_STATE, lambda t: _edit_state(t, quant_type="fp4")), "down_proj: .*is of type 'fp4', not 'nf4'"),
    ],
    ids=["no-absmax", "no-nested", "codes-alone", "one-weight-alone", "codes-cut", "nan", "shape", "type"],
)
def test_refuses_broken_experts_by_name(change: Any, message: str, packed_mixture: Path) -> None:
    with pytest.raises(UserError, match=rf"1 weights cannot be used:\n  {_EXPERTS}\.{message}"):
        load_pretrained(edited(packed_mixture, change))


def test_a_missing_packed_weight_is_named(packed: Path) -> None:
    keys = ("weight", "weight.absmax", "weight.nested_absmax", "weight.quant_map", "weight.nested_quant_map", _STATE)
    with pytest.raises(UserError, match=rf"missing in the checkpoint \(1\): {_LAYER}\.weight"):
        load_pretrained(edited(packed, _without(*keys)))
