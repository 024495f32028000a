"""Several adapters of several kinds in one model: stacks, switching, mixed batches, combinations."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.families import METHODS, logits, moved, tiny, tokens, train

from fastpeft.errors import UserError
from fastpeft.methods import (
    BottleneckAdapterConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from fastpeft.models import accelerate, quantize
from fastpeft.nn import Adapted, IA3Linear, LoRALinear, NF4Linear

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS = ["lora", "dora", "pissa", "ia3", "prompt", "p-tuning-mlp", "houlsby", "parallel"]
kinds = pytest.mark.parametrize("name", KINDS)


def stack(*names: str, quantised: bool = False) -> PeftModel:
    """A model with one adapter of each method, all moved."""
    torch.manual_seed(2)
    base = quantize(tiny()) if quantised else tiny()
    model = get_peft_model(base, METHODS[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, METHODS[name])
    model.set_adapter(names)
    return moved(model)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_a_stack_of_all_kinds_trains_saves_and_loads(quantised: bool, tmp_path: Path) -> None:
    model, ids = stack(*KINDS, quantised=quantised), tokens()
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    assert model.num_virtual_tokens == 10
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(KINDS)
    base = quantize(tiny()) if quantised else tiny()
    loaded = PeftModel.from_pretrained(base, tmp_path / KINDS[0], KINDS[0])
    for name in KINDS[1:]:
        loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter(KINDS, inference_mode=True)
    assert torch.equal(logits(loaded.eval(), ids), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, ids), expected)
    moved(copied)
    assert torch.equal(logits(model, ids), expected)


@kinds
def test_each_acts_alone_and_the_others_stay(name: str) -> None:
    model, ids = stack(*KINDS), tokens()
    model.set_adapter(name)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names and all(f".{name}." in f"{n}." for n in names)
    active = logits(model, ids)
    for other in [other for other in KINDS if other != name]:
        model.delete_adapter(other)
    assert torch.equal(logits(model, ids), active)
    assert not torch.allclose(active, logits(tiny(), ids), atol=1e-4)
    assert not any(f".{other}." in f"{n}." for n, _ in model.named_parameters() for other in KINDS if other != name)


@pytest.mark.parametrize("first", ["lora", "ia3"])
def test_ia3_scales_what_lora_gives_in_either_order(first: str) -> None:
    second = "ia3" if first == "lora" else "lora"
    model, ids = stack(first, second), tokens()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
    assert isinstance(layer, IA3Linear) and isinstance(layer.base_layer, LoRALinear)
    x = torch.randn(3, 64)
    vector = layer.ia3_l["ia3"].flatten()
    torch.testing.assert_close(layer(x), layer.base_layer(x) * vector)
    assert not any(".base_layer" in key for key in model.adapter_state_dict("lora"))
    expected = logits(model, ids)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), expected, **CLOSE)


def test_what_merges_may_be_merged_beside_what_does_not() -> None:
    model, ids = stack("lora", "prompt", "houlsby"), tokens()
    expected = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    for name, what in (("prompt", "virtual tokens"), ("houlsby", "bottleneck adapters")):
        with pytest.raises(UserError, match=f"'{name}' is {what}"):
            model.merge_and_unload(adapter_names=[name])
    model.set_adapter("lora")
    expected = logits(model, ids)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), expected, **CLOSE)


# Mixed batches.


@kinds
def test_a_mixed_batch_gives_each_sample_its_adapter(name: str) -> None:
    model, ids = stack(name), tokens(rows=3)
    torch.manual_seed(6)
    model.add_adapter("other", METHODS[name])
    model.set_adapter("other")
    moved(model, seed=7)
    both = [name, "other"]
    alone = {}
    for each in both:
        model.set_adapter(each)
        alone[each] = logits(model, ids)
    model.set_adapter(both)
    routing = [name, "other", name]
    mixed = logits(model, ids, adapter_names=routing)
    for row, each in enumerate(routing):
        torch.testing.assert_close(mixed[row], alone[each][row], **CLOSE)
    assert not torch.allclose(alone[name], alone["other"], atol=1e-4)
    assert torch.equal(logits(model, ids), logits(model, ids)), "the routing ends with its call"


@kinds
def test_a_mixed_batch_trains_each_samples_adapter(name: str) -> None:
    model, ids = stack(name).train(), tokens(rows=2)
    model.add_adapter("other", METHODS[name])
    model.set_adapter([name, "other"])
    model(input_ids=ids, labels=ids, adapter_names=[name, name]).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if f".{name}" in n)
    assert not any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if ".other" in n)


def test_a_mixed_batch_of_kinds_and_of_none() -> None:
    model, ids = stack("lora", "ia3", "houlsby"), tokens(rows=4)
    mixed = logits(model, ids, adapter_names=["lora", None, "houlsby", "ia3"])
    torch.testing.assert_close(mixed[1], logits(tiny(), ids)[1], **CLOSE)
    for row, name in ((0, "lora"), (2, "houlsby"), (3, "ia3")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model, ids)[row], **CLOSE)


def test_a_mixed_batch_with_a_module_trained_whole() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "one")
    moved(model)
    ids = tokens(rows=2)
    mixed = logits(model, ids, adapter_names=["__base__", "one"])
    torch.testing.assert_close(mixed[0], logits(tiny(), ids)[0], **CLOSE)
    torch.testing.assert_close(mixed[1], logits(model, ids)[1], **CLOSE)


def test_mixed_batches_that_cannot_be() -> None:
    model, ids = stack("lora", "prompt"), tokens(rows=2)
    for names, message in (
        (["lora"] * 3, "adapter_names has 3 entries and the batch 2 rows"),
        ([], "adapter_names is empty"),
        (["lora", "no"], "no adapter 'no'"),
        (["prompt", None], "equally many virtual tokens"),
    ):
        with pytest.raises(UserError, match=message):
            model(input_ids=ids, adapter_names=names)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "houlsby"])
@pytest.mark.parametrize("how", ["transformers", "reentrant", "fastpeft"])
def test_a_mixed_batch_with_checkpointing_has_the_gradients_without(name: str, how: str) -> None:
    grads = []
    for recomputes in (False, True):
        model = stack(name, "lora" if name != "lora" else "ia3")
        if recomputes and how == "fastpeft":
            accelerate(model, checkpointing="full")
        elif recomputes:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.train()
        out = model(input_ids=tokens(rows=3), adapter_names=[*model.peft_config, None], labels=tokens(rows=3))
        out.loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert all(m.routing is None for m in model.modules() if isinstance(m, Adapted))
    assert grads[0].keys() == grads[1].keys() and len({n for n in grads[0] if name in n}) > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_generation_of_a_mixed_batch() -> None:
    model, ids = stack("lora", "ia3"), tokens()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    mixed = model.generate(ids, adapter_names=["lora", "ia3"], **options)
    for row, name in enumerate(("lora", "ia3")):
        model.set_adapter(name)
        assert torch.equal(model.generate(ids, **options)[row], mixed[row])


# Combinations.


def test_ia3_vectors_are_combined_linearly() -> None:
    model = stack("ia3")
    torch.manual_seed(6)
    model.add_adapter("other", METHODS["ia3"])
    model.set_adapter("other")
    moved(model, seed=8)
    model.add_weighted_adapter(["ia3", "other"], [0.25, 0.75], "both", combination_type="linear")
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    torch.testing.assert_close(layer.ia3_l["both"], 0.25 * layer.ia3_l["ia3"] + 0.75 * layer.ia3_l["other"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["lora", "ia3"], [1, 1], "new"), "combines LoRA adapters"),
        ((["lora", "dora"], [1, 1], "new"), "'dora' has DoRA"),
        ((["lora", "pissa"], [1, 1], "new"), "starting factors"),
        ((["lora", "small"], [1, 1], "new", "linear"), "all ranks must be equal; they are lora 4, small 2"),
        ((["lora"], [1, 2], "new"), "1 different adapters and 2 weights"),
        ((["lora", "small"], [1, 1], "new", "tie"), "did you mean 'ties'"),
        ((["lora", "small"], [1, 1], "new", "ties_svd"), "density is None"),
        ((["lora", "small"], [1, 1], "new", "svd", 0), "svd_rank=0"),
        ((["lora", "no"], [1, 1], "new"), "no adapter 'no'"),
        ((["lora", "small"], [1, 1], "lora"), "'lora' is taken"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_combinations_that_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    model = stack("lora", "ia3", "dora", "pissa")
    model.add_adapter("small", LoraConfig(r=2, target_modules=["q_proj"]))
    before = list(model.peft_config)
    with pytest.raises(UserError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == before


# Quantised bases.


def test_requantising_a_merged_model_says_what_it_costs(caplog: pytest.LogCaptureFixture) -> None:
    model = stack("lora", quantised=True)
    dense = copy.deepcopy(model).merge_and_unload()
    with caplog.at_level(logging.WARNING, "fastpeft"):
        merged = model.merge_and_unload(requantize=True)
    assert "quantising 14 merged layers again changes their weights by" in caplog.text
    layers = [(n, m) for n, m in merged.named_modules() if isinstance(m, NF4Linear)]
    assert len(layers) == 14
    for name, layer in layers:
        weight = dense.get_submodule(name).weight
        assert torch.equal(layer.dequantize(), NF4Linear.from_linear(dense.get_submodule(name)).dequantize())
        assert 0 < (layer.dequantize() - weight).norm() / weight.norm() < 0.15


def test_loftq_begins_nearer_to_the_weights_than_nf4_alone(tmp_path: Path) -> None:
    ids = tokens()

    def error(model: torch.nn.Module) -> float:
        return float((logits(model, ids) - logits(tiny(), ids)).norm())

    errors = [error(quantize(tiny()))]
    for turns in (1, 5):
        config = LoraConfig(
            r=16, target_modules="all-linear", init_lora_weights="loftq", loftq_config={"loftq_iter": turns}
        )
        model = get_peft_model(tiny(), config)
        assert isinstance(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer, NF4Linear)
        errors.append(error(model))
        if turns == 1:
            model.save_pretrained(tmp_path)
            loaded = PeftModel.from_pretrained(quantize(tiny()), tmp_path)
            assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert errors[2] < errors[1] < errors[0]
    with pytest.warns(UserWarning, match="several turns of LoftQ"):
        model.save_pretrained(tmp_path)
    model = stack("lora")
    with pytest.raises(UserError, match="replaces the base's weights"):
        model.add_adapter("second", config)


# Names and kinds.


def test_a_layer_is_a_feedforward_one_for_all_or_none() -> None:
    model = get_peft_model(tiny(), IA3Config(), "one")
    with pytest.raises(UserError, match="has its input scaled by another adapter"):
        model.add_adapter("two", IA3Config(target_modules=["down_proj"]))


def test_shared_a_needs_one_rank() -> None:
    with pytest.raises(UserError, match="have ranks 8, 4"):
        get_peft_model(
            tiny(), LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}, shared_a=True)
        )


def test_adapters_may_be_named_as_methods_of_our_modules() -> None:
    model = get_peft_model(tiny(), PromptTuningConfig(num_virtual_tokens=3), "saved")
    model.add_adapter("training_run", BottleneckAdapterConfig())
    assert list(model.peft_config) == ["saved", "training_run"]


@kinds
def test_a_model_with_adapters_is_not_quantised(name: str) -> None:
    model = stack(name)
    model.add_adapter("lora_too", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="quantise first and add adapters then"):
        quantize(model.get_base_model())


@pytest.mark.parametrize("name", ["lora", "houlsby", "p-tuning-lstm"])
def test_dropout_can_be_switched_off(name: str) -> None:
    changes: dict[str, Any] = {"lora": {"lora_dropout": 0.5}, "houlsby": {"dropout": 0.5}}
    config = dataclasses.replace(METHODS[name], **changes.get(name, {"encoder_dropout": 0.5}))
    model, ids = moved(get_peft_model(tiny(), config)).train(), tokens()
    first, second = (model(input_ids=ids).logits for _ in range(2))
    assert not torch.equal(first, second)
    for module in model.modules():
        if isinstance(module, Adapted):
            module.set_dropout(0.0)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dora_under_autocast_has_the_lengths_of_fp32() -> None:
    model = stack("dora")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    expected = layer._norms("dora")
    weight = layer.weight + layer.scaling["dora"] * layer.lora_B["dora"].weight @ layer.lora_A["dora"].weight
    torch.testing.assert_close(expected, weight.norm(dim=1), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer._norms("dora"), expected)
