"""LoRA of a mixture's experts: what every method has, PEFT's files, stacks, mixed batches, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from methods.families import logits, moved, tiny, tokens, train
from models.families import tiny as other
from torch import nn

from fastpeft.errors import UserError
from fastpeft.methods import IA3Config, LoraConfig, PeftModel, get_peft_model
from fastpeft.models import accelerate, quantize
from fastpeft.nn import LoRAExperts, NF4Experts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Setting `save_embedding_layers`")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
quantised = pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
parameters = pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "up", "down"])


def base(quantised: bool = False) -> nn.Module:
    return quantize(tiny("mixtral")) if quantised else tiny("mixtral")


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": BOTH, **options})


def make(quantised: bool = False, **options: Any) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(base(quantised), config(**options))


def experts_of(model: nn.Module) -> LoRAExperts:
    return next(module for module in model.modules() if isinstance(module, LoRAExperts))


@quantised
def test_trains_saves_loads_and_is_off(quantised: bool, tmp_path: Path) -> None:
    model, ids = make(quantised, target_modules=[]), tokens()
    assert isinstance(experts_of(model).base_layer, NF4Experts) == quantised
    before = logits(model, ids)
    torch.testing.assert_close(before, logits(base(quantised), ids), **CLOSE)  # B begins at zero
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    expected = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(quantised), tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    losses = train(model, ids, seed=4)
    again = PeftModel.from_pretrained(base(quantised), tmp_path, is_trainable=True)
    assert train(again, ids, seed=4) == losses


@quantised
def test_merged_equals_unmerged(quantised: bool) -> None:
    model, ids = moved(make(quantised)), tokens()
    expected = logits(model, ids)
    assert not torch.allclose(expected, logits(base(quantised), ids), atol=1e-3)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    merged = model.merge_and_unload()
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in tiny("mixtral").named_parameters()}
    torch.testing.assert_close(logits(merged, ids), expected, **CLOSE)


def test_merged_into_nf4_again_says_what_that_changes(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = moved(make(True)), tokens()
    expected = logits(model, ids)
    with caplog.at_level(logging.WARNING):
        merged = model.merge_and_unload(requantize=True)
    assert "quantising 6 merged layers again" in caplog.text  # two q_proj, and two weights of two layers' experts
    assert sum(isinstance(module, NF4Experts) for module in merged.modules()) == 2
    assert (logits(merged, ids) - expected).norm() / expected.norm() < 0.2


@parameters
def test_counts_are_the_formula(parameters: list[str]) -> None:
    sizes = {"experts.gate_up_proj": 64 + 256, "experts.down_proj": 128 + 64}
    numbers = 2 * 4 * sum(4 * sizes[name] for name in parameters)  # layers, rank, experts
    assert make(target_modules=[], target_parameters=parameters).get_nb_trainable_parameters()[0] == numbers


@parameters
def test_files_are_pefts_both_ways(parameters: list[str], tmp_path: Path) -> None:
    options = {"target_parameters": parameters, "task_type": "CAUSAL_LM", "rank_pattern": {"experts.down_proj": 3}}
    if BOTH[1] not in parameters:
        del options["rank_pattern"]
    ours = make(**options)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **options))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    start = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(logits(ours, tokens()), logits(theirs, tokens()), **start)
    moved(ours).save_pretrained(tmp_path / "ours")
    moved(theirs, seed=7).save_pretrained(tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(logits(there, tokens()), logits(ours, tokens()), **start)
    here = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    torch.testing.assert_close(logits(here, tokens()), logits(theirs, tokens()), **start)
    assert not torch.allclose(logits(here, tokens()), logits(ours, tokens()), atol=1e-3)


@pytest.mark.parametrize("start", ["gaussian", False], ids=str)
def test_other_starts_are_drawn_as_pefts(start: Any) -> None:
    ours = make(init_lora_weights=start, target_modules=[])
    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": BOTH, "init_lora_weights": start}
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**options))
    downs = {name: p for name, p in theirs.named_parameters() if "lora_A.default" in name}
    assert len(downs) == 4
    for name, a in downs.items():
        layer = ours.get_submodule(name.partition(".experts")[0] + ".experts")
        weight = "gate_up_proj" if "base_layer.lora" in name else "down_proj"
        assert torch.equal(layer.factors("default", weight)[0].reshape(a.shape), a)


def test_a_mixed_batch_gives_each_sample_its_adapter() -> None:
    model = make()
    model.add_adapter("down", config(target_modules=[], target_parameters=BOTH[1:], r=2))
    model.add_adapter("vectors", IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model.set_adapter(["default", "down", "vectors"])
    moved(model)
    names, ids = ["down", None, "default", "vectors", "down"], tokens(rows=5)
    mixed = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name is None:
            with model.disable_adapter():
                alone = logits(model, ids)
        else:
            model.set_adapter(name)
            alone = logits(model, ids)
        torch.testing.assert_close(mixed[row], alone[row], **CLOSE)
    assert not torch.allclose(mixed[0], mixed[4], atol=1e-3)


def test_two_act_together_and_one_is_deleted() -> None:
    model, ids = moved(make()), tokens()
    alone = logits(model, ids)
    model.add_adapter("second", config(r=2))
    model.set_adapter("second")
    moved(model, seed=9)
    model.set_adapter(["default", "second"])
    together = logits(model, ids)
    assert not torch.allclose(together, alone, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), together, **CLOSE)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), alone)
    assert experts_of(model).held() == ["default"]


@quantised
def test_checkpointing_gives_the_gradients_without(quantised: bool) -> None:
    grads = []
    for recomputes in (False, True):
        model = moved(make(quantised))
        if recomputes:
            accelerate(model, checkpointing="full")
        model.train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert sum("gate_up_proj" in name for name in grads[0]) == 4
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.gate_upproj"]}, "did you mean 'gate_up_proj'"),
        ({"target_parameters": [*BOTH, "nothing"]}, "'nothing' matches no weight"),
        ({"target_parameters": ["q_proj.weight"]}, "is in a Linear, which cannot be adapted so"),
        ({"target_parameters": "experts.down_proj"}, r"must be a list, \['experts.down_proj'\]"),
        ({"lora_dropout": 0.1}, "target_parameters with lora_dropout=0.1"),
        ({"use_dora": True}, "target_parameters with use_dora=True"),
        ({"init_lora_weights": "pissa"}, "target_parameters with init_lora_weights='pissa'"),
        ({"layers_to_transform": [0]}, "target_parameters with layers_to_transform"),
        ({"target_parameters": None, "target_modules": []}, "target_modules is empty"),
        ({"target_parameters": None, "target_modules": ["down_proj"]}, r"target_parameters=\['experts.down_proj'\]"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_refuses_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = base()
    before = [(n, type(m)) for n, m in model.named_modules()]
    with pytest.raises(UserError, match=message):
        get_peft_model(model, config(**options))
    assert [(n, type(m)) for n, m in model.named_modules()] == before


@quantised
def test_a_layer_of_their_name_is_pointed_to_the_weight(quantised: bool) -> None:
    for names in (["gate_up_proj"], ["q_proj", "gate_up_proj"]):
        with pytest.raises(UserError, match=r"is one weight of all experts .* target_parameters=\['experts.gate_up"):
            get_peft_model(base(quantised), LoraConfig(target_modules=names))


def test_experts_of_another_form_are_refused() -> None:
    """gpt-oss keeps them transposed, interleaved and with biases."""
    model = other("gpt-oss", attn_implementation="eager")
    with pytest.raises(UserError, match="in a GptOssExperts, which cannot be adapted so"):
        get_peft_model(model, config())
    with pytest.raises(UserError, match=r"in a form that adapters cannot stand beside.*bottleneck adapter"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "gate_up_proj"]))


@pytest.mark.parametrize("family", ["qwen3-moe", "olmoe"])
def test_other_mixtures_train(family: str) -> None:
    model = get_peft_model(quantize(other(family)), config(target_modules="all-linear"))
    losses = train(model, tokens())
    assert losses[-1] < losses[0]


def test_a_model_without_experts_says_so() -> None:
    with pytest.raises(UserError, match="no mixture of experts whose weights can be adapted"):
        get_peft_model(tiny(), config())


def test_a_combination_is_refused() -> None:
    model = make()
    model.add_adapter("other", config())
    with pytest.raises(UserError, match="has DoRA, target_parameters"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "new")


@pytest.mark.gpu
@quantised
def test_gradients_in_bfloat16_on_a_gpu_follow_float32(quantised: bool) -> None:
    """Sizes that the grouped products take; a token near the edge between two experts may choose the other one."""
    grads = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = moved(get_peft_model(base(quantised), config(target_modules=[], r=8)))
        model.to(device)
        for module in model.modules():  # the base alone: adapters stay float32
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad and parameter.is_floating_point():
                    setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        ids = tokens().to(device)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 8
    for name, expected in grads[0].items():
        assert (grads[1][name] - expected).norm() < 0.1 * expected.norm(), name
