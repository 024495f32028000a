"""``accelerate`` and ``restore``: the same numbers as the untouched model, whatever is done around them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models.families import FAMILIES, batch, tiny
from tolerances import assert_exact, assert_ratio
from torch import Tensor, nn

import fastpeft
import fastpeft.models.fused as forwards
from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, get_peft_model
from fastpeft.models import Left, Report, quantize, report

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
_LAYERS = 2


def counts(model: nn.Module) -> dict[str, int]:
    found = report(model)
    assert isinstance(found, Report)
    return found.replaced


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss: Tensor = model(**inputs).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def joined(grads: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector; alone, one that is zero but for rounding (of k's bias) could not be compared."""
    return torch.cat([grad.flatten() for grad in grads.values()])


def lora(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted.train()


# --- the same numbers ---
@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients(family: str, dtype: torch.dtype) -> None:
    plain = tiny(family, dtype)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    assert fastpeft.accelerate(fused) is fused
    inputs = batch()
    logits = [m(**inputs, **skip).logits for m, skip in ((fused, {"skip_logits": False}), (plain, {}), (exact, {}))]
    assert_ratio(*logits)
    (loss, grads), (_, plain_grads), (exact_loss, exact_grads) = (gradients(m, inputs) for m in (fused, plain, exact))
    assert abs(loss - exact_loss) <= 4 * torch.finfo(dtype).eps * exact_loss
    assert grads.keys() == plain_grads.keys()
    assert_ratio(joined(grads), joined(plain_grads), joined(exact_grads))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    plain = tiny(family, dtype).cuda()
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fastpeft.accelerate(fused)
    assert counts(fused)["layer"] == _LAYERS and not report(fused).left  # type: ignore[union-attr]
    inputs = {name: value.cuda() for name, value in batch(tokens=37).items()}
    (loss, grads), (_, plain_grads), (exact_loss, exact_grads) = (gradients(m, inputs) for m in (fused, plain, exact))
    assert abs(loss - exact_loss) <= 4 * torch.finfo(dtype).eps * exact_loss
    assert_ratio(joined(grads), joined(plain_grads), joined(exact_grads))


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_in_a_family_is_found(family: str) -> None:
    model = fastpeft.accelerate(tiny(family))
    found = report(model)
    assert found is not None and found.left == []
    norms = sum("norm" in name for name, _ in model.named_parameters())
    assert found.replaced == {"norm": norms, "attention": _LAYERS, "mlp": _LAYERS, "layer": _LAYERS, "loss": 1}


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_adapters_before_or_after(quantized: bool) -> None:
    before, after = tiny("llama"), tiny("llama")
    if quantized:
        quantize(before), quantize(after)
    torch.manual_seed(1)
    plain = lora(copy.deepcopy(before))
    torch.manual_seed(1)
    before = fastpeft.accelerate(lora(before))  # type: ignore[assignment]
    torch.manual_seed(1)
    after = lora(fastpeft.accelerate(after))  # type: ignore[assignment]
    (loss, grads), (other_loss, other_grads), (plain_loss, plain_grads) = (
        gradients(m, batch()) for m in (before, after, plain)
    )
    assert grads.keys() == other_grads.keys() == plain_grads.keys()
    assert_exact(loss, other_loss)
    assert_exact(joined(grads), joined(other_grads))
    assert torch.allclose(joined(grads), joined(plain_grads), rtol=1e-4, atol=1e-6)
    assert torch.allclose(loss, plain_loss)


def unlike(model: nn.Module) -> None:
    """Layers that do not go with their neighbours: another dropout, two adapters, none, a hook."""
    first, second = (module for name, module in model.named_modules() if name.endswith("self_attn"))
    first.q_proj.lora_dropout["default"] = 1e-9  # in a mask of 15 bits: none
    second.k_proj.adapters_disabled = True
    first, second = (module for name, module in model.named_modules() if name.endswith("mlp"))
    first.gate_proj.add_adapter("second", 2, 4, init_lora_weights=False)
    first.gate_proj.active_adapters = ["default", "second"]
    second.up_proj.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "unlike"])
def test_layers_of_one_input_go_together_where_they_can(
    alike: bool, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    if quantized:
        quantize(model)
    plain = lora(model)
    if not alike:
        unlike(plain)
    fused = fastpeft.accelerate(copy.deepcopy(plain))
    groups: list[int] = []
    original = forwards.together
    monkeypatch.setattr(forwards, "together", lambda products, x: groups.append(len(products)) or original(products, x))  # type: ignore[func-returns-value]
    (loss, grads), (plain_loss, plain_grads) = (gradients(m, batch()) for m in (fused, plain))
    assert groups == ([3, 2] * _LAYERS if alike else [])
    assert grads.keys() == plain_grads.keys()
    assert torch.allclose(joined(grads), joined(plain_grads), rtol=1e-4, atol=1e-6)
    assert torch.allclose(loss, plain_loss)


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    plain = peft.get_peft_model(tiny("qwen3"), config)
    fused = copy.deepcopy(plain)
    fastpeft.accelerate(fused)
    assert counts(fused)["mlp"] == _LAYERS
    (loss, grads), (plain_loss, plain_grads) = (gradients(m, batch()) for m in (fused, plain))
    assert grads.keys() == plain_grads.keys()
    assert torch.allclose(loss, plain_loss)
    assert torch.allclose(joined(grads), joined(plain_grads), rtol=1e-4, atol=1e-6)


def test_an_adapter_on_the_output_layer_needs_no_logits_either() -> None:
    model = lora(fastpeft.accelerate(tiny("llama")))
    assert model(**batch()).logits is None
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(fastpeft.accelerate(tiny("llama")), config).train()
    out = model(**batch())
    assert out.logits is None
    with model.disable_adapter():
        assert model(**batch()).logits is None


# --- things around it ---
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3", "mistral"])
def test_generation_with_a_cache(family: str) -> None:
    plain = tiny(family).eval()
    fused = fastpeft.accelerate(copy.deepcopy(plain))
    ids = batch()["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert_exact(fused.generate(ids, **settings), plain.generate(ids, **settings))  # type: ignore[operator]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padding_is_not_attended_to(family: str) -> None:
    plain = tiny(family)
    fused = fastpeft.accelerate(copy.deepcopy(plain))
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :5] = 0  # on the left, where a causal mask alone would not do
    labels = inputs["labels"].masked_fill(mask == 0, -100)
    labels[1, 5] = -100  # what a padded place predicts
    inputs = {"input_ids": inputs["input_ids"], "labels": labels, "attention_mask": mask}
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(mask == 0, 9)}
    assert torch.allclose(fused(**inputs).loss, plain(**inputs).loss)
    assert torch.allclose(fused(**inputs).loss, fused(**other).loss)


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
def test_packed_rows_do_not_see_each_other(family: str, checkpointing: str) -> None:
    model = fastpeft.accelerate(tiny(family), checkpointing=checkpointing)
    ids = batch(rows=1, tokens=20)["input_ids"]
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    packed = {"input_ids": ids, "position_ids": positions, "labels": ids.clone()}
    packed["labels"][0, [0, 8]] = -100
    first, second = ids[:, :8], ids[:, 8:]
    separate = (
        model(input_ids=first, labels=first, num_items_in_batch=18).loss
        + model(input_ids=second, labels=second, num_items_in_batch=18).loss
    )
    loss = model(**packed, num_items_in_batch=18).loss
    assert torch.allclose(loss, separate, rtol=1e-5)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    others = torch.autograd.grad(separate, list(model.parameters()), allow_unused=True)
    for grad, other in zip(grads, others, strict=True):
        assert (grad is None) == (other is None)
        assert grad is None or torch.allclose(grad, other, rtol=1e-3, atol=1e-5)


def test_names_files_and_copies(tmp_path: Any) -> None:
    plain = tiny("llama")
    fused = fastpeft.accelerate(copy.deepcopy(plain))
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    fused.save_pretrained(tmp_path)
    torch.save(fused.state_dict(), tmp_path / "state.pt")
    loaded = type(plain).from_pretrained(tmp_path, dtype=torch.float32)
    assert_exact(loaded.train()(**batch()).logits, plain(**batch()).logits)
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied(**batch()).loss != fused(**batch()).loss  # the copy's forwards are bound to the copy
    fastpeft.restore(copied)
    assert copied(**batch()).logits is not None and fused(**batch()).logits is None


def test_restore_undoes_everything() -> None:
    model = tiny("gemma3")
    before = [dict(module.__dict__) for module in model.modules()]
    logits = model(**batch()).logits
    fastpeft.accelerate(model, checkpointing="full")
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert fastpeft.restore(model) is model
    for module, own in zip(model.modules(), before, strict=True):
        added = module.__dict__.keys() - own.keys()  # the switch leaves things of transformers' own
        assert not any("fastpeft" in name for name in added)
        assert not added & {"forward", "_set_gradient_checkpointing"}
    assert_exact(model(**batch()).logits, logits)
    assert report(model) is None
    fastpeft.accelerate(model)
    assert counts(model)["layer"] == _LAYERS


def test_restore_under_the_wrapper_of_another_library() -> None:
    """transformers' Trainer leaves its own forward around ours while it trains in mixed precision."""
    model = fastpeft.accelerate(tiny("llama"))
    ours, calls = model.forward, []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    model.forward = wrapper  # type: ignore[method-assign]
    fastpeft.restore(model)
    assert model(**batch()).logits is not None and calls == [1]


def test_a_forward_that_is_not_ours_is_left() -> None:
    model = tiny("llama")
    norm = model.model.norm  # type: ignore[union-attr]
    norm.forward = lambda x: x  # type: ignore[method-assign, operator, assignment, union-attr]
    fastpeft.accelerate(model)
    found = report(model)
    assert found is not None
    assert found.left == [Left("model.norm", "norm", "another library has replaced its forward")]


def test_a_second_call_changes_nothing() -> None:
    model = fastpeft.accelerate(tiny("llama"), mlp=False)
    assert "mlp" not in counts(model)
    fastpeft.accelerate(model)
    assert counts(model) == {"norm": 5, "attention": 2, "mlp": 2, "layer": 2, "loss": 1}


# --- what is not known ---
@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("llama", {"hidden_act": "relu"}, "its activation ReLU is none of silu, gelu_tanh, gelu"),
        ("granite", {"residual_multiplier": 0.5}, "it computes something else than a pre-norm layer"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_attn_dropout drops 0.1 of its input"),
        ("cohere", {}, "CohereForCausalLM has no decoder layers of a known structure"),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "GPT2LMHeadModel has no decoder layers"),
    ],
)
def test_the_unknown_is_left_and_told(model_type: str, changes: dict[str, Any], reason: str) -> None:
    plain = tiny(model_type, **changes).eval()
    fused = fastpeft.accelerate(copy.deepcopy(plain))
    assert reason in str(report(fused))
    assert torch.allclose(fused(**batch()).logits, plain(**batch()).logits, rtol=1e-4, atol=1e-5)


def test_a_model_on_the_meta_device_is_left() -> None:
    with torch.device("meta"):
        model = tiny("llama")
    fastpeft.accelerate(model)
    assert counts(model) == {}
    assert "its weights are on the meta device" in str(report(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpointing": "ful"}, "checkpointing is 'ful'; it must be full, selective, offload, none; did you mean"),
        ({"checkpointing": "full", "activation_budget_gb": 3}, "a budget is a number of gigabytes above 0"),
        ({"activation_budget_gb": -1}, "activation_budget_gb is -1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match="accelerate: ") as error:
        fastpeft.accelerate(model, **options)
    assert message in str(error.value)
    assert report(model) is None


# --- the loss ---
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_takes_what_transformers_takes(family: str) -> None:
    changes = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    plain = tiny(family, **changes)
    fused = fastpeft.accelerate(copy.deepcopy(plain))
    inputs = batch()
    kept = torch.tensor([3, 5, 9])
    for extra in (
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 7, "labels": inputs["labels"].masked_fill(inputs["labels"] == -100, 7)},
        {"shift_labels": inputs["labels"].roll(-1, 1)},
        {"logits_to_keep": kept, "shift_labels": inputs["labels"][:, kept + 1]},
        {"logits_to_keep": 4, "labels": inputs["labels"][:, -4:]},
        {"output_hidden_states": True},
    ):
        out, expected = fused(**{**inputs, **extra}), plain(**{**inputs, **extra})  # type: ignore[dict-item]
        assert out.logits is None
        assert torch.allclose(out.loss, expected.loss, rtol=1e-5), extra
        assert (out.hidden_states is None) == (expected.hidden_states is None)


def test_where_logits_are_read_they_are_there() -> None:
    model = fastpeft.accelerate(tiny("llama"))
    inputs = batch()
    assert model(**inputs).logits is None
    assert model(**inputs, skip_logits=False).logits is not None
    assert model(input_ids=inputs["input_ids"]).logits is not None
    assert isinstance(model(**inputs, return_dict=False), tuple)
    model.eval()
    assert model(**inputs).logits is not None
    assert model(**inputs, skip_logits=True).logits is None


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "olmoe"])
def test_a_mixtures_loss_needs_no_logits_unless_its_router_is_balanced(family: str) -> None:
    plain = tiny(family)
    fused = fastpeft.accelerate(copy.deepcopy(plain))
    assert counts(fused)["loss"] == 1
    assert "mlp" not in {left.kind for left in report(fused).left}
    inputs = batch()
    out, expected = fused(**inputs), plain(**inputs)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    balanced = fused(**inputs, output_router_logits=True)
    assert balanced.logits is not None and balanced.aux_loss is not None
    torch.testing.assert_close(balanced.loss, plain(**inputs, output_router_logits=True).loss, rtol=1e-5, atol=1e-6)
    assert balanced.loss > out.loss
    for model in (fused, plain):
        model.config.output_router_logits = True
    torch.testing.assert_close(fused(**inputs).loss, plain(**inputs).loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(fused(**inputs).loss, balanced.loss)
