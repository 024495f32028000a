"""Which modules a configuration means, and that a mistake leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, get_peft_model
from fastpeft.methods.inject import inject_adapter, plan_adapter
from fastpeft.nn import LoRALinear, NF4Linear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def leaves(names: tuple[str, ...]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def targets(model: nn.Module, **options: object) -> tuple[str, ...]:
    return plan_adapter(model, LoraConfig(**options)).targets


def test_list_matches_last_parts_only(make_llama: Callable) -> None:
    found = targets(make_llama(), target_modules=["q_proj", "mlp.up_proj"])
    assert found == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    )


def test_string_matches_the_whole_name(make_llama: Callable) -> None:
    assert targets(make_llama(), target_modules=r".*\.1\.self_attn\.[qk]_proj") == (
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    )


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-Linear"])
def test_all_linear_is_every_layer_but_the_output_embedding(make_llama: Callable, spelling: str) -> None:
    plan = plan_adapter(make_llama(), LoraConfig(target_modules=spelling))
    assert leaves(plan.targets) == {*ATTENTION, *MLP}
    assert len(plan.targets) == 14
    assert sorted(plan.config.target_modules) == sorted((*ATTENTION, *MLP))


def test_all_linear_names_layers_in_full_where_short_names_would_mean_more() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"proj": nn.Linear(4, 4)}), "b": nn.ModuleDict({"proj": nn.ReLU()})})
    plan = plan_adapter(model, LoraConfig(target_modules="all-linear"))
    assert plan.config.target_modules == ["a.proj"]


def test_default_targets_are_the_familys(make_llama: Callable) -> None:
    plan = plan_adapter(make_llama(), LoraConfig())
    assert leaves(plan.targets) == {"q_proj", "v_proj"}
    assert plan.config.target_modules == ["q_proj", "v_proj"]


def test_the_callers_config_is_not_changed(make_llama: Callable) -> None:
    config = LoraConfig(target_modules="all-linear")
    get_peft_model(make_llama(), config)
    assert config == LoraConfig(target_modules="all-linear")


def test_exclude_modules(make_llama: Callable) -> None:
    left = targets(make_llama(), target_modules=["q_proj", "v_proj"], exclude_modules=["0.self_attn.q_proj"])
    assert "model.layers.0.self_attn.q_proj" not in left and len(left) == 3
    assert leaves(targets(make_llama(), target_modules="all-linear", exclude_modules=r".*\.mlp\..*")) == {*ATTENTION}


@pytest.mark.parametrize("how", [{"layers_to_transform": 1}, {"layers_to_transform": [1], "layers_pattern": "layers"}])
@pytest.mark.parametrize("what", ["all-linear", ["q_proj", "up_proj"]], ids=["all", "list"])
def test_layers_to_transform(make_llama: Callable, what: object, how: dict[str, object]) -> None:
    found = targets(make_llama(), target_modules=what, **how)
    assert found and all(name.startswith("model.layers.1.") for name in found)


def test_modules_to_save_are_not_adapted_as_well(make_llama: Callable) -> None:
    plan = plan_adapter(make_llama(), LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]))
    assert leaves(plan.targets) == {"q_proj"}
    assert plan.modules_to_save == ("lm_head",)


def test_nf4_layers_are_adapted() -> None:
    model = nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 8))
    assert targets(model, target_modules="all-linear") == ("0", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_porj"]}, "'q_porj'] matches no module of the model; did you mean 'q_proj'"),
        ({"target_modules": ["zzz"]}, "the names end in: q_proj, k_proj, v_proj, o_proj, gate_proj"),
        ({"target_modules": ["q_proj", "w_proj"]}, "'w_proj' matches no module of the model; did you mean"),
        (
            {"target_modules": "q_proj"},
            "a string must match whole names as a regular expression; linear layers: q_proj",
        ),
        (
            {"target_modules": ["mlp"]},
            "'model.layers.0.mlp' is a LlamaMLP, .*; name the linear layers in it: gate_proj",
        ),
        ({"target_modules": ["norm"]}, "'model.norm' is a LlamaRMSNorm, which cannot be adapted"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "all 2 matching modules are left out"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["0.self_atn.q_proj"]},
            "exclude_modules: '0.self_atn.q_proj' matches no module of the model; did you mean",
        ),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, "rank_pattern: 'v_proj' matches none"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"qq": 2}}, "alpha_pattern: 'qq' matches none"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, "no target in layer 7; .* are 0 to 1"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
            "no target lies in a numbered layer of 'blocks'",
        ),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' matches no module of the model; did you mean"),
        ({"modules_to_save": ["layers"]}, "'model.layers' is a ModuleList, which is never called itself"),
    ],
    ids=str,
)
def test_a_mistake_is_named_and_changes_nothing(make_llama: Callable, options: dict[str, object], message: str) -> None:
    model = make_llama()
    before = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    with pytest.raises(UserError, match=message.replace("]", r"\]")):
        get_peft_model(model, LoraConfig(**options))
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == before


def test_unknown_family_lists_candidates() -> None:
    with pytest.raises(UserError, match="use 'all-linear', or name some of this model's linear layers: up, down"):
        get_peft_model(nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}), LoraConfig())


def test_no_linear_layer_at_all() -> None:
    with pytest.raises(UserError, match="holds no linear layer"):
        get_peft_model(nn.Sequential(nn.ReLU()), LoraConfig(target_modules="all-linear"))


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("target", ["all-linear", ["other"]], ids=["all", "named"])
def test_linear_layers_of_other_libraries_are_refused(target: object) -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 8), "other": OwnForward(8, 4)})
    with pytest.raises(UserError, match=r"'other' is a OwnForward, .*load the model dense and call fastpeft\.quantize"):
        get_peft_model(model, LoraConfig(target_modules=target))


def test_a_plan_needs_no_weights_but_an_adapter_does(make_llama: Callable) -> None:
    assert len(targets(make_llama().to("meta"), target_modules="all-linear")) == 14
    with pytest.raises(UserError, match="on the meta device"):
        get_peft_model(make_llama().to("meta"), LoraConfig())


def test_a_quantised_module_cannot_be_trained_whole() -> None:
    model = nn.ModuleDict({"up": nn.Linear(64, 64), "head": NF4Linear.from_linear(nn.Linear(64, 8))})
    with pytest.raises(UserError, match=r"packed weights cannot be trained; keep it dense with .*skip=\['head'\]"):
        get_peft_model(model, LoraConfig(target_modules=["up"], modules_to_save=["head"]))


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_undo_gives_the_model_back(make_llama: Callable, modules_to_save: list[str] | None) -> None:
    model = make_llama()
    model.model.norm.weight.requires_grad_(False)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    plan = plan_adapter(model, LoraConfig(target_modules="all-linear", modules_to_save=modules_to_save))
    undo = inject_adapter(nn.Module(), model, plan, "default")
    assert any(isinstance(module, LoRALinear) for module in model.modules())
    undo.close()
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before


def test_a_failure_half_way_is_undone(make_llama: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    add_adapter, calls = LoRALinear.add_adapter, []

    def fails_at_the_third(self: LoRALinear, *options: object, **named: object) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory left")
        add_adapter(self, *options, **named)

    monkeypatch.setattr(LoRALinear, "add_adapter", fails_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
