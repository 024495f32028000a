"""PeftModel: adapters on, off, several, merged; and that tools take it for the model it wraps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, PeftModel, get_peft_model
from fastpeft.models import quantize
from fastpeft.nn import LoRALinear, NF4Linear

Make = Callable[..., nn.Module]
LOGITS = {"rtol": 1e-5, "atol": 1e-5}  # fp32, merged or not
ALL = LoraConfig(r=4, target_modules="all-linear")


def trained(model: PeftModel, seed: int = 5) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=input_ids).logits


def test_a_new_adapter_leaves_the_output(make_llama: Make, input_ids: torch.Tensor) -> None:
    torch.testing.assert_close(
        logits(get_peft_model(make_llama(), ALL), input_ids), logits(make_llama(), input_ids), rtol=0, atol=1e-6
    )


def test_only_the_adapter_trains(make_llama: Make) -> None:
    model = get_peft_model(make_llama(), ALL)
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    frozen = get_peft_model(make_llama(), LoraConfig(inference_mode=True))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_disable_adapter_is_the_base(
    make_llama: Make, input_ids: torch.Tensor, modules_to_save: list[str] | None
) -> None:
    config = LoraConfig(target_modules="all-linear", modules_to_save=modules_to_save)
    model = trained(get_peft_model(make_llama(), config))
    base, adapted = logits(make_llama(), input_ids), logits(model, input_ids)
    assert not torch.allclose(base, adapted, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids), base)
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model, input_ids), base)
    assert torch.equal(logits(model, input_ids), adapted)


def test_disable_adapter_ends_with_an_exception(make_llama: Make, input_ids: torch.Tensor) -> None:
    model = trained(get_peft_model(make_llama(), ALL))
    adapted = logits(model, input_ids)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model, input_ids), adapted)


def test_disable_adapter_warns_of_trained_biases(make_llama: Make) -> None:
    model = get_peft_model(make_llama(attention_bias=True), LoraConfig(bias="all"))
    with pytest.warns(UserWarning, match="biases were trained"), model.disable_adapter():
        pass


def test_merge_adapter_and_back(make_llama: Make, input_ids: torch.Tensor) -> None:
    model = trained(get_peft_model(make_llama(), ALL))
    before = logits(model, input_ids)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, input_ids), before, **LOGITS)
    model.unmerge_adapter()
    assert torch.equal(logits(model, input_ids), before)


def test_changing_adapters_unmerges(make_llama: Make, input_ids: torch.Tensor, tmp_path: Path) -> None:
    """A merged weight of before would go on being used, and the change would seem to do nothing."""
    model = trained(get_peft_model(make_llama(), ALL), seed=1)
    model.save_pretrained(tmp_path)
    first = logits(model, input_ids)
    model.add_adapter("second", ALL)
    model.merge_adapter()
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, input_ids), logits(make_llama(), input_ids), rtol=0, atol=1e-6)
    model.set_adapter("default")
    trained(model, seed=2).merge_adapter()
    model.load_adapter_weights(tmp_path)
    assert torch.equal(logits(model, input_ids), first)


def test_merge_and_unload_gives_a_plain_model(make_llama: Make, input_ids: torch.Tensor) -> None:
    model = trained(get_peft_model(make_llama(), LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])))
    expected = logits(model, input_ids)
    merged = model.merge_and_unload(safe_merge=True)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in make_llama().named_parameters()}
    torch.testing.assert_close(logits(merged, input_ids), expected, **LOGITS)


def test_merging_frees_each_weight_before_the_next(make_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(make_llama(), ALL)
    to_dense, seen = LoRALinear.to_dense, []

    def watched(self: LoRALinear, names: list[str]) -> nn.Linear:
        assert all(weight() is None for weight in seen)
        seen.append(weakref.ref(self.base_layer.weight))
        return to_dense(self, names)

    monkeypatch.setattr(LoRALinear, "to_dense", watched)
    model.merge_and_unload()
    assert len(seen) == 14


def test_unload_gives_the_base_back(make_llama: Make, input_ids: torch.Tensor) -> None:
    model = trained(get_peft_model(make_llama(), LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])))
    base = model.unload()
    assert torch.equal(logits(base, input_ids), logits(make_llama(), input_ids))
    again = get_peft_model(base, ALL)
    assert isinstance(again, PeftModel)


def test_safe_merge_names_the_layer_and_changes_none(make_llama: Make) -> None:
    model = trained(get_peft_model(make_llama(), ALL))
    model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").lora_B["default"].weight.data[0] = float("inf")
    with pytest.raises(UserError, match=r"'model\.layers\.1\.mlp\.up_proj' holds NaN or Inf"):
        model.merge_and_unload(safe_merge=True)
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 14


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", ["adapted", "saved"])
def test_merging_a_tied_head_unties_it(make_llama: Make, input_ids: torch.Tensor, tmp_path: Path, how: str) -> None:
    """Merging into the shared weight would change the input embedding too, and with it every layer's input."""
    config = LoraConfig(target_modules=["q_proj", *(["lm_head"] if how == "adapted" else [])])
    if how == "saved":
        config.modules_to_save = ["lm_head"]
    model = trained(get_peft_model(make_llama(tie_word_embeddings=True), config))
    expected = logits(model, input_ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, input_ids), expected, **LOGITS)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded, input_ids), expected, **LOGITS)


# Several adapters.


def test_two_adapters_switch_and_add_up(make_llama: Make, input_ids: torch.Tensor) -> None:
    model = trained(get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])), seed=1)
    first = logits(model, input_ids)
    model.add_adapter("second", LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, input_ids), first)
    model.set_adapter("second")
    assert all(p.requires_grad == (".second." in name) for name, p in model.named_parameters())
    second = logits(trained(model, seed=2), input_ids)
    assert not torch.allclose(second, first, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model, input_ids), first)
    model.set_adapter(["default", "second"])
    both = logits(model, input_ids)
    assert not torch.allclose(both, first, atol=1e-3) and not torch.allclose(both, second, atol=1e-3)
    torch.testing.assert_close(logits(model.merge_and_unload(), input_ids), both, **LOGITS)


def test_delete_adapter(make_llama: Make, input_ids: torch.Tensor) -> None:
    model = trained(get_peft_model(make_llama(), LoraConfig(modules_to_save=["lm_head"])))
    first = logits(model, input_ids)
    model.add_adapter("second", LoraConfig())
    model.set_adapter("second")
    model.delete_adapter("second")
    assert model.active_adapter == "default" and list(model.peft_config) == ["default"]
    assert not any(".second." in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model, input_ids), first)
    with pytest.raises(UserError, match="is the last adapter; use unload"):
        model.delete_adapter("default")


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "training"])
def test_unusable_adapter_names(make_llama: Make, name: str) -> None:
    with pytest.raises(UserError, match="use letters, digits"):
        get_peft_model(make_llama(), LoraConfig(), name)


def test_adapter_name_taken_or_unknown(make_llama: Make) -> None:
    model = get_peft_model(make_llama(), LoraConfig())
    with pytest.raises(UserError, match="'default' is taken"):
        model.add_adapter("default", LoraConfig())
    for call in (model.set_adapter, model.delete_adapter, model.adapter_state_dict):
        with pytest.raises(UserError, match="no adapter 'other'; the model has default"):
            call("other")
    with pytest.raises(UserError, match="name at least one"):
        model.set_adapter([])


def test_a_failed_second_adapter_leaves_the_first(make_llama: Make, input_ids: torch.Tensor) -> None:
    model = trained(get_peft_model(make_llama(), ALL))
    before, flags = logits(model, input_ids), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(UserError, match="did you mean"):
        model.add_adapter("second", LoraConfig(target_modules=["q_porj"]))
    assert list(model.peft_config) == ["default"]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(logits(model, input_ids), before)


def test_only_one_adapter_may_train_biases(make_llama: Make) -> None:
    model = get_peft_model(make_llama(attention_bias=True), LoraConfig(bias="all"))
    with pytest.raises(UserError, match="only one adapter may train them"):
        model.add_adapter("second", LoraConfig())


def test_wrapping_twice_is_refused(make_llama: Make) -> None:
    model = get_peft_model(make_llama(), LoraConfig())
    with pytest.raises(UserError, match="use its add_adapter"):
        get_peft_model(model, LoraConfig())
    with pytest.raises(UserError, match="hold adapters already"):
        get_peft_model(model.get_base_model(), LoraConfig())


def test_a_foreign_config_is_refused(make_llama: Make) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(UserError, match=r"needs fastpeft\.LoraConfig .LoraConfig\.from_dict"):
        get_peft_model(make_llama(), peft.LoraConfig())


# Over other bases.


def test_bf16_base_keeps_fp32_adapters(make_llama: Make, input_ids: torch.Tensor) -> None:
    model = get_peft_model(make_llama(dtype=torch.bfloat16), ALL)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, input_ids).dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.merge_and_unload().parameters()} == {torch.bfloat16}


def test_nf4_base_trains_saves_and_merges(make_llama: Make, input_ids: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(quantize(make_llama()), ALL)
    dense = get_peft_model(make_llama(), ALL)
    assert model.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {name for name, p in model.named_parameters() if "lora_" in name}
    expected = logits(trained(model), input_ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantize(make_llama()), tmp_path)
    assert torch.equal(logits(loaded, input_ids), expected)
    merged = loaded.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, NF4Linear) for module in merged.modules())
    torch.testing.assert_close(logits(merged, input_ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_trains_saves_and_loads_on(
    device: str, quantised: bool, make_llama: Make, input_ids: torch.Tensor, tmp_path: Path
) -> None:
    def base() -> nn.Module:
        model = make_llama(dtype=torch.bfloat16).to(device)
        return quantize(model) if quantised else model

    model, tokens = get_peft_model(base(), ALL), input_ids.to(device)
    assert {p.device.type for p in model.parameters()} == {device}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_a_plain_module_works_too() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), LoraConfig(target_modules=["0"]))
    x = torch.randn(3, 8)
    assert type(model) is PeftModel
    model(x).sum().backward()
    assert torch.equal(model(x), model.merge_and_unload()(x))


# As the model it wraps.


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_pass_gradient_checkpointing(make_llama: Make, input_ids: torch.Tensor, reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = trained(get_peft_model(make_llama(), ALL)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == {name for name, p in model.named_parameters() if "lora_" in name}
    for name, grad in grads[0].items():
        assert grad.abs().sum() > 0, name
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_generates_with_and_without_its_adapter(make_llama: Make, input_ids: torch.Tensor) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    base = make_llama().generate(input_ids, **options)
    model = trained(get_peft_model(make_llama(), LoraConfig(target_modules="all-linear", lora_alpha=64)))
    adapted = model.generate(input_ids, **options)
    assert adapted.shape == base.shape and not torch.equal(adapted, base)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids, **options), base)
    assert torch.equal(model.merge_and_unload().generate(input_ids, **options), adapted)


def test_passes_on_what_the_model_has(make_llama: Make) -> None:
    model = get_peft_model(make_llama(), LoraConfig())
    inner = model.get_base_model()
    assert model.config is inner.config and model.device == inner.device and model.dtype == inner.dtype
    assert model.get_input_embeddings() is inner.get_input_embeddings()
    assert model.can_generate() and model.main_input_name == "input_ids"
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


def test_deepcopy_and_print(make_llama: Make, input_ids: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(get_peft_model(make_llama(), LoraConfig(modules_to_save=["lm_head"])))
    assert torch.equal(logits(copy.deepcopy(model), input_ids), logits(model, input_ids))
    model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,} || all params: {total:,} || trainable%")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_plain_trainer_trains_and_evaluates_it(make_llama: Make, tmp_path: Path) -> None:
    """Trainer decides by the model's signature which columns to keep and whether there is an evaluation loss."""
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6], "source": "a file"} for _ in range(8)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all(set(row) == {"input_ids", "labels"} for row in batch), "the unused column is dropped"
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}

    model = get_peft_model(make_llama(), LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
