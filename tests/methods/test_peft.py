"""Side by side with stock PEFT: names, initial values, files both ways, logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastpeft.methods import LoraConfig, PeftModel, get_peft_model

peft = pytest.importorskip("peft", reason="peft is not installed")

CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "family-default": {},
    "all-linear-rslora": {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "use_rslora": True},
    "regex-gaussian": {"target_modules": r".*\.mlp\..*proj", "init_lora_weights": "gaussian", "task_type": "CAUSAL_LM"},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 3, "q_proj": 5},
        "alpha_pattern": {r".*\.0\.self_attn\.q_proj": 20, "q_proj": 2},
    },
    "one-layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["0.self_attn.k_proj"]},
    "lm_head-saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False},
    "lm_head-and-norm-saved": {"target_modules": "all-linear", "modules_to_save": ["lm_head", "model.norm"]},
    "lm_head-adapted": {"target_modules": ["q_proj", "lm_head"]},
    "bias-all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias-lora_only": {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
}
LOGITS = {"rtol": 1e-5, "atol": 1e-5}  # fp32, two libraries, the same arithmetic in another order
named = pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Setting `save_embedding_layers`")


def make_base(make_llama: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    """Three layers: from 20 linear layers on, PEFT too writes "all-linear" to the file by short names."""
    biases = {"attention_bias": True, "mlp_bias": True} if "bias" in options else {}
    return make_llama(num_hidden_layers=3, **biases)


def trained(model: nn.Module) -> nn.Module:
    """Move every trainable value, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=input_ids).logits


@named
def test_names_values_and_counts_are_pefts(make_llama: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    base = make_base(make_llama, options)
    torch.manual_seed(3)
    ours = get_peft_model(base, LoraConfig(**options))
    base = make_base(make_llama, options)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options))
    named_ours, named_theirs = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(named_ours) == list(named_theirs)
    for name, parameter in named_ours.items():
        assert torch.equal(parameter, named_theirs[name]), name
        assert parameter.requires_grad == named_theirs[name].requires_grad, name
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@named
def test_our_file_is_pefts_file(
    make_llama: Callable[..., nn.Module], input_ids: torch.Tensor, tmp_path: Path, options: dict[str, Any]
) -> None:
    ours = trained(get_peft_model(make_base(make_llama, options), LoraConfig(**options)))
    theirs = trained(peft.get_peft_model(make_base(make_llama, options), peft.LoraConfig(**options)))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")

    mine, others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    others.pop("base_model.model.lm_head.base_layer.weight", None)  # PEFT adds the frozen head when it is a target
    assert {key: (t.shape, t.dtype) for key, t in mine.items()} == {
        key: (t.shape, t.dtype) for key, t in others.items()
    }
    config, reference = (peft.LoraConfig.from_pretrained(str(tmp_path / name)).to_dict() for name in ("ours", "theirs"))
    assert config == reference

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns about keys that do not fit
        warnings.simplefilter("ignore", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(make_base(make_llama, options), tmp_path / "ours")
    torch.testing.assert_close(logits(loaded, input_ids), logits(ours, input_ids), **LOGITS)


@named
def test_pefts_file_loads_here(
    make_llama: Callable[..., nn.Module], input_ids: torch.Tensor, tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs = trained(peft.get_peft_model(make_base(make_llama, options), peft.LoraConfig(**options)))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make_base(make_llama, options), tmp_path)
    expected = logits(theirs, input_ids)
    assert not torch.allclose(expected, logits(make_base(make_llama, options), input_ids), atol=1e-3)
    torch.testing.assert_close(logits(ours, input_ids), expected, **LOGITS)
    torch.testing.assert_close(logits(ours.merge_and_unload(), input_ids), expected, **LOGITS)


def test_second_adapter_goes_to_a_subfolder_as_in_peft(
    make_llama: Callable[..., nn.Module], input_ids: torch.Tensor, tmp_path: Path
) -> None:
    ours = get_peft_model(make_llama(), LoraConfig())
    ours.add_adapter("second", LoraConfig(target_modules=["down_proj"]))
    ours.set_adapter("second")
    trained(ours).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "second",
    ]
    theirs = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "second")
    torch.testing.assert_close(logits(theirs, input_ids), logits(ours, input_ids), **LOGITS)


def test_our_config_file_has_only_keys_of_peft(make_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    get_peft_model(make_llama(), LoraConfig()).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(written) <= set(peft.LoraConfig().to_dict())
    assert written["inference_mode"] is True
    assert written["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


def test_gradients_are_pefts(make_llama: Callable[..., nn.Module], input_ids: torch.Tensor) -> None:
    options: dict[str, Any] = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False}
    grads = []
    for build, config in ((get_peft_model, LoraConfig(**options)), (peft.get_peft_model, peft.LoraConfig(**options))):
        base = make_llama()
        torch.manual_seed(3)
        model = build(base, config)
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6, msg=name)
