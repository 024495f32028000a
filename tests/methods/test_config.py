"""LoraConfig: PEFT's defaults and keys, and every value it refuses."""

from __future__ import annotations

import pytest

from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig


def test_defaults_are_pefts() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = peft.LoraConfig().to_dict()
    ours = LoraConfig().to_dict()
    assert {key: ours[key] for key in ours} == {key: theirs[key] for key in ours}


def test_accepts_everything_peft_writes_by_default() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    read = LoraConfig.from_dict(peft.LoraConfig(r=4, target_modules=["v_proj", "q_proj"]).to_dict())
    assert read == LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def test_to_dict_and_back() -> None:
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj"],
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 2.5},
        layers_to_transform=[0, 1],
        modules_to_save=["lm_head"],
        use_rslora=True,
        init_lora_weights="gaussian",
        bias="lora_only",
    )
    assert LoraConfig.from_dict(config.to_dict()) == config


def test_lists_are_taken_from_tuples_and_sets() -> None:
    config = LoraConfig(target_modules={"v_proj", "q_proj"}, modules_to_save=("lm_head",), layers_to_transform=range(2))
    assert (config.target_modules, config.modules_to_save) == (["q_proj", "v_proj"], ["lm_head"])
    assert config.layers_to_transform == [0, 1]


@pytest.mark.parametrize(
    ("module", "rank", "alpha"),
    [
        ("model.layers.0.self_attn.q_proj", 4, 8),
        ("model.layers.1.self_attn.q_proj", 4, 20),
        ("model.layers.0.mlp.down_proj", 8, 8),
        ("model.layers.0.mlp.updown_proj", 8, 8),
        ("model.layers.3.mlp.up_proj", 2, 8),
    ],
)
def test_patterns_match_the_end_of_a_name(module: str, rank: int, alpha: float) -> None:
    config = LoraConfig(
        rank_pattern={"q_proj": 4, "own_proj": 3, r"layers\.3\..*": 2}, alpha_pattern={"1.self_attn.q_proj": 20}
    )
    assert (config.rank_of(module), config.alpha_of(module)) == (rank, alpha)


def test_scaling() -> None:
    config = LoraConfig(r=2, lora_alpha=6, rank_pattern={"v_proj": 3})
    assert config.scaling_of("q_proj") == 3
    assert config.scaling_of("v_proj") == 2
    assert LoraConfig(r=2, lora_alpha=6, use_rslora=True).scaling_of("q_proj") == pytest.approx(4.242640687)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0; a rank must be a whole number of at least 1"),
        ({"r": 2.0}, "r=2.0; a rank must be a whole number"),
        ({"r": True}, "r=True; a rank"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]=-1; a rank"),
        ({"rank_pattern": {"q_(proj": 1}}, r"rank_pattern: 'q_\(proj' is not a regular expression"),
        ({"lora_alpha": 0}, "lora_alpha=0; must be a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan; must be a number above 0"),
        ({"alpha_pattern": {"q_proj": "8"}}, r"alpha_pattern\['q_proj'\]='8'; must be a number"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0; must be a probability"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1; must be a probability"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [3]}, "must be a list of module names"),
        ({"target_modules": "*.q_proj"}, "is not a regular expression"),
        ({"modules_to_save": "lm_head"}, r"must be a list, \['lm_head'\]"),
        ({"bias": "some"}, "bias='some'; must be one of 'none', 'all', 'lora_only'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva'; this version has True, False, 'gaussian'"),
        ({"init_lora_weights": "olora", "shared_a": True}, "shared_a with init_lora_weights='olora'"),
        ({"loftq_config": {"loftq_bits": 2}, "init_lora_weights": "loftq"}, "this version has loftq_bits 4"),
        ({"task_type": "SEQ_CLS"}, "name the head in modules_to_save"),
        ({"task_type": "causal_lm"}, "did you mean 'CAUSAL_LM'"),
        ({"layers_pattern": "layers"}, "does nothing without layers_to_transform"),
        ({"layers_to_transform": -1}, "must be layer numbers, counted from 0"),
        ({"layers_to_transform": 1, "target_modules": ".*q_proj"}, "cannot go with a regular expression"),
    ],
    ids=str,
)
def test_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoraConfig(**options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LoraConfig reads 'LORA'"),
        ({"target_modlues": ["q_proj"]}, "unknown key 'target_modlues'; did you mean 'target_modules'"),
        ({"zzz": 1}, "unknown key 'zzz'; known keys: r, target_modules"),
        ({"kasa_config": {"beta": 1}}, r"kasa_config=.* is a PEFT option"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=.* would change the result"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"r": 0}, "^file.json: r=0; a rank"),
    ],
    ids=str,
)
def test_from_dict_refuses(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoraConfig.from_dict(values, where="file.json")
