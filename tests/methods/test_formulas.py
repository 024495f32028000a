"""Trained numbers and memory of every method against the closed formulas of the docstrings; tables; full training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods.families import METHODS, logits, tiny, tokens, train

from fastpeft.errors import UserError
from fastpeft.methods import (
    BottleneckAdapterConfig,
    FullConfig,
    IA3Config,
    LoraConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from fastpeft.methods.counting import adapter_bytes
from fastpeft.models import quantize
from fastpeft.nn import NF4Linear

LAYERS, D, FF, KV, VOCABULARY = 2, 64, 128, 32, 96
LINEAR = [(D, D), (KV, D), (KV, D), (D, D), (FF, D), (FF, D), (D, FF)]  # (n, k) of q, k, v, o, gate, up, down


def lora(r: int) -> int:
    return LAYERS * sum(r * (k + n) for n, k in LINEAR)


def lstm(h: int, layers: int = 2) -> int:
    inputs = [D] + [2 * h] * (layers - 1)
    return sum(2 * (4 * h * (width + h) + 8 * h) for width in inputs)


V, H, E, B = 5, 24, 20, 24  # virtual tokens, hidden sizes of the encoders of families.METHODS
ROWS = LAYERS * sum(n for n, _ in LINEAR)
FORMULAS: dict[str, tuple[Callable[[], int], Callable[[], int]]] = {  # numbers, and bytes kept beside them
    "lora": (lambda: lora(4), lambda: 0),
    "rslora": (lambda: lora(4), lambda: 0),
    "dora": (lambda: lora(4) + ROWS, lambda: 4 * ROWS),
    "pissa": (lambda: lora(4), lambda: 4 * lora(4)),
    "olora": (lambda: lora(4), lambda: 4 * lora(4)),
    "shared-a": (lambda: lora(4) - LAYERS * 3 * 4 * D, lambda: 0),
    "ia3": (lambda: LAYERS * (KV + KV + FF), lambda: 0),
    "prompt": (lambda: V * D, lambda: 0),
    "p-tuning-mlp": (lambda: V * D + H * (2 * D + H) + 2 * H + D, lambda: 0),
    "p-tuning-lstm": (lambda: V * D + lstm(H) + 4 * H**2 + 2 * H + 2 * H * D + D, lambda: 0),
    "p-tuning-nemo": (lambda: V * E + E * B + B + B * D + D, lambda: 0),
    "houlsby": (lambda: 2 * LAYERS * (2 * 4 * D + 4 + D), lambda: 0),
    "pfeiffer": (lambda: LAYERS * (2 * 4 * D + 4 + D + 4 * D), lambda: 0),
    "parallel": (lambda: LAYERS * (2 * 32 * D + 32 + D + 1), lambda: 0),
    "nemo-parallel": (lambda: 2 * LAYERS * (2 * 32 * D + 32 + D + 2 * D), lambda: 0),
    "nemo-linear": (lambda: 2 * LAYERS * (2 * 32 * D + 32 + D + 2 * D), lambda: 0),
}


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", list(METHODS))
def test_numbers_and_bytes_are_those_of_the_formula(name: str, quantised: bool) -> None:
    base = quantize(tiny()) if quantised else tiny()
    before = sum(p.numel() for p in tiny().parameters())
    model = get_peft_model(base, METHODS[name])
    numbers, beside = (formula() for formula in FORMULAS[name])
    assert model.get_nb_trainable_parameters() == (numbers, before + numbers)
    assert adapter_bytes(model, "default") == 4 * numbers + beside


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_and_heads(dora: bool) -> None:
    model = get_peft_model(tiny(), LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"], use_dora=dora))
    lengths = D + VOCABULARY if dora else 0
    assert model.get_nb_trainable_parameters()[0] == 2 * 3 * (VOCABULARY + D) + lengths
    assert adapter_bytes(model, "default") == 4 * (2 * 3 * (VOCABULARY + D) + 2 * lengths)


def test_every_method_has_a_formula() -> None:
    assert FORMULAS.keys() == METHODS.keys()


def test_the_table_has_a_line_for_each_module(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    model.set_adapter(["default", "prompt"])
    model.print_trainable_parameters(per_layer=True)
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["model.layers.0.self_attn.q_proj", "LoRALinear", "1,024"],
        ["model.layers.1.self_attn.q_proj", "LoRALinear", "1,024"],
        ["lm_head", "ModulesToSaveWrapper", "6,144"],
        ["prompt_encoder", "Prompts", "128"],
    ]
    assert last.startswith("trainable params: 8,320 ||")


# Full training.


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, lambda name: True),
        ({"freeze": ["embed_tokens", "layers.0"]}, lambda name: "embed_tokens" not in name and ".0." not in name),
        ({"train": ["self_attn"], "freeze": r".*\.1\..*"}, lambda name: "layers.0.self_attn" in name),
        ({"train": r".*norm\.weight"}, lambda name: "norm" in name),
        ({"inference_mode": True}, lambda name: False),
    ],
    ids=str,
)
def test_names_choose_what_trains(options: dict[str, Any], trained: Callable[[str], bool]) -> None:
    model = tiny()
    same = get_peft_model(model, FullConfig(**options))
    assert same is model
    assert all(p.requires_grad == trained(name) for name, p in model.named_parameters())


def test_full_training_keeps_fp32_masters_where_asked() -> None:
    model = get_peft_model(tiny().bfloat16(), FullConfig(freeze=["embed_tokens"], master_dtype="float32"))
    assert {n for n, p in model.named_parameters() if p.dtype != torch.float32} == {"model.embed_tokens.weight"}
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, tokens())
    assert losses[-1] < losses[0]
    plain = get_peft_model(tiny(), FullConfig())
    assert train(plain, tokens())[-1] < logits(plain, tokens()).numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ["self_atn"]}, "train: 'self_atn' matches no parameter"),
        ({"freeze": ["q_porj"]}, "did you mean 'q_proj'"),
        ({"train": ["lm_head"], "freeze": ["lm_head"]}, "leaves nothing of train"),
        ({"train": "*"}, "is not a regular expression"),
        ({"master_dtype": "float16"}, "must be 'float32' or None"),
        ({"freeze": [3]}, "must be a list of names"),
    ],
    ids=str,
)
def test_full_training_refuses(options: dict[str, Any], message: str) -> None:
    model = tiny()
    model.lm_head.requires_grad_(False)
    with pytest.raises(UserError, match=message):
        get_peft_model(model, FullConfig(**options))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_a_quantised_weight_cannot_be_trained() -> None:
    with pytest.raises(UserError, match=r"is quantised \(torch.uint8\), and packed weights cannot be trained"):
        get_peft_model(quantize(tiny()), FullConfig())
    model = get_peft_model(quantize(tiny()), FullConfig(train=["lm_head", "norm"]))
    assert any(isinstance(module, NF4Linear) for module in model.modules())


# Bad configurations of the other methods.


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (IA3Config, {"target_modules": ["q_porj"]}, "did you mean 'q_proj'"),
        (IA3Config, {"target_modules": ["q_proj"], "feedforward_modules": ["up_proj"]}, "are not among target_modules"),
        (IA3Config, {"target_modules": []}, "target_modules is empty"),
        (PromptEncoderConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size=0"),
        (PromptEncoderConfig, {"encoder_dropout": 1.0}, "encoder_dropout=1.0; must be a probability"),
        (BottleneckAdapterConfig, {"adapter_type": "houlsbi"}, "did you mean 'houlsby'"),
        (BottleneckAdapterConfig, {"reduction_factor": 0}, "reduction_factor=0; must be a number above 0"),
        (BottleneckAdapterConfig, {"reduction_factor": 2, "bottleneck_size": 3}, "say the same thing"),
        (BottleneckAdapterConfig, {"non_linearity": "swosh"}, "did you mean 'swish'"),
        (BottleneckAdapterConfig, {"scaling": "learn"}, "must be a number, or 'learned'"),
        (BottleneckAdapterConfig, {"output_adapter": False}, "there is nothing to train"),
        (BottleneckAdapterConfig, {"leave_out": [2]}, "there is no layer 2; the model's are 0 to 1"),
        (BottleneckAdapterConfig, {"leave_out": [0, 1]}, "all layers are left out"),
        (LoraConfig, {"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}, "is for linear layers"),
        (LoraConfig, {"target_modules": ["q_proj"], "fan_in_fan_out": True}, "none of the targets"),
        (LoraConfig, {"target_modules": ["k_proj"], "r": 40, "init_lora_weights": "pissa"}, "r=40 is greater than"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refuses_and_changes_nothing(kind: type, options: dict[str, Any], message: str) -> None:
    model = tiny()
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(UserError, match=message):
        get_peft_model(model, kind(**options))
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before


def test_packed_experts_are_not_trained_whole() -> None:
    model = quantize(tiny("mixtral"))
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.experts\.gate_up_proj' is quantised"):
        get_peft_model(model, FullConfig(train=["experts"]))
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp' is quantised to NF4, and packed weights cannot"):
        get_peft_model(model, config)


def test_bottlenecks_need_layers() -> None:
    with pytest.raises(UserError, match="no layer with an attention"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), BottleneckAdapterConfig())
