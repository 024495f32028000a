"""Checkpointing: the gradients of a layer that keeps everything, with less kept and nothing run that nobody reads."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from models.families import FAMILIES, batch, tiny
from models.test_accelerate import gradients, joined, lora
from tolerances import assert_exact
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from fastpeft.models import quantize
from fastpeft.models.plan import LayerBytes, LayerPlan, Planner

MODES: dict[str, dict[str, Any]] = {
    "full": {"checkpointing": "full"},
    "selective": {"checkpointing": "selective"},
    "budget": {"activation_budget_gb": 1.5e-4},  # some layers of each sort
    "tight": {"activation_budget_gb": 1e-6},
    "offload": {"checkpointing": "offload"},
}
KINDS = ("full", "lora", "lora-nf4", "frozen-norms")


def model_of(kind: str, family: str = "llama", **changes: Any) -> nn.Module:
    model: nn.Module = tiny(family, num_hidden_layers=4, **changes)
    if kind == "lora-nf4":
        quantize(model)
    if kind.startswith("lora"):
        return lora(model, dropout=0.2)
    if kind == "frozen-norms":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" not in name and "embed" not in name)
    return model


def seeded_gradients(model: nn.Module, autocast: bool = False, **changes: Any) -> Any:
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return gradients(model, {**batch(), **changes})


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_model_that_keeps_everything(kind: str, mode: str, autocast: bool) -> None:
    """Dropout is on: the masks have to be the same when a layer is recomputed."""
    model = fastpeft.accelerate(model_of(kind))
    loss, grads = seeded_gradients(model, autocast)
    fastpeft.accelerate(model, **MODES[mode])
    again, others = seeded_gradients(model, autocast)
    assert_exact(again, loss)
    assert grads.keys() == others.keys()
    assert_exact(joined(others), joined(grads))


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, mode: str) -> None:
    model = fastpeft.accelerate(lora(tiny(family), dropout=0.2))
    loss, grads = seeded_gradients(model)
    fastpeft.accelerate(model, **MODES[mode])
    again, others = seeded_gradients(model)
    assert_exact(again, loss)
    assert torch.allclose(joined(others), joined(grads), rtol=1e-5, atol=1e-7)  # sums over views may be ordered anew


@pytest.mark.parametrize("mode", MODES)
def test_dropout_in_attention(mode: str) -> None:
    model = fastpeft.accelerate(model_of("lora", attention_dropout=0.3, attn_implementation="eager"))
    loss, grads = seeded_gradients(model)
    fastpeft.accelerate(model, **MODES[mode])
    again, others = seeded_gradients(model)
    assert_exact(again, loss)
    assert_exact(joined(others), joined(grads))


@pytest.mark.parametrize("mode", ["full", "tight"])
def test_layers_of_another_library_see_the_random_state_they_had(mode: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False)
    model = fastpeft.accelerate(peft.get_peft_model(tiny("llama"), config).train())
    loss, grads = seeded_gradients(model)
    fastpeft.accelerate(model, **MODES[mode])
    again, others = seeded_gradients(model)
    after = torch.get_rng_state()
    assert_exact(again, loss)
    assert_exact(joined(others), joined(grads))
    torch.manual_seed(3)
    model(**batch())
    assert torch.equal(torch.get_rng_state(), after)  # backward drew nothing


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "mode", "attention", "products"),
    [
        ("llama", "full", 1, 4 + 3),  # all but the down-projection; q, k and v are one, as are gate and up
        ("llama", "selective", 1, 4),
        ("llama", "tight", 2, 4 + 3),
        ("gemma3", "full", 1, 4 + 4),  # the norm after the down-projection reads its output
        ("phi3", "full", 1, 4 + 3),
    ],
)
def test_what_is_run(family: str, mode: str, attention: int, products: int) -> None:
    no_window = {"layer_types": ["full_attention"] * 2} if family == "gemma3" else {}  # a mask repeats k and v
    model = fastpeft.accelerate(lora(tiny(family, **no_window)), **MODES[mode])
    with Counting() as counting:
        gradients(model, batch())
    layers = 2
    assert counting.calls["_scaled_dot_product_flash_attention_for_cpu"] == attention * layers
    assert counting.calls["lora_linear"] == products * layers
    assert counting.calls["lora_linear_backward"] == 4 * layers


def test_transformers_own_switch_turns_ours() -> None:
    model = fastpeft.accelerate(lora(tiny("llama")))
    _, grads = gradients(model, batch())
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    with Counting() as counting:
        _, others = gradients(model, batch())
    assert counting.calls["lora_linear"] == (4 + 3) * 2
    assert_exact(joined(others), joined(grads))
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()  # type: ignore[operator]
    with Counting() as counting:
        gradients(model, batch())
    assert counting.calls["lora_linear"] == 4 * 2


def test_a_model_that_was_checkpointed_before() -> None:
    model = tiny("llama")
    model.gradient_checkpointing_enable()
    model = lora(fastpeft.accelerate(model))
    with Counting() as counting:
        gradients(model, batch())
    assert counting.calls["lora_linear"] == (4 + 3) * 2


def test_an_unknown_attention_is_checkpointed_as_a_whole() -> None:
    plain = tiny("llama")
    model = fastpeft.accelerate(copy.deepcopy(plain), rope=False, checkpointing="full")
    (loss, grads), (plain_loss, plain_grads) = (gradients(m, batch()) for m in (model, plain))
    assert torch.allclose(loss, plain_loss)
    assert torch.allclose(joined(grads), joined(plain_grads), rtol=1e-4, atol=1e-6)


def test_evaluation_and_no_grad_keep_nothing() -> None:
    model = fastpeft.accelerate(lora(tiny("llama")), checkpointing="full")
    with torch.no_grad():
        assert not model(**batch()).loss.requires_grad
    model.eval()
    model(**batch()).loss.backward()


def test_a_second_backward_is_refused() -> None:
    model = fastpeft.accelerate(lora(tiny("llama")), checkpointing="full")
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time through a checkpointed layer"):
        loss.backward()


def test_copies_do_not_share_what_they_keep() -> None:
    model = fastpeft.accelerate(lora(tiny("llama")), checkpointing="offload")
    copied = copy.deepcopy(model)
    for one, other in zip(model.modules(), copied.modules(), strict=True):
        if "_fastpeft_checkpointing" in one.__dict__:
            assert (
                one.__dict__["_fastpeft_checkpointing"].shared is not other.__dict__["_fastpeft_checkpointing"].shared
            )
    (loss, grads), (other_loss, other_grads) = (gradients(m, batch()) for m in (model, copied))
    assert_exact(loss, other_loss)
    assert_exact(joined(grads), joined(other_grads))


# --- plans ---
SIZES = LayerBytes(
    stream=10, attention=10, outputs={"q_proj": 10, "o_proj": 10, "gate_proj": 30, "up_proj": 30}, rest=50
)
FULL, MLP_TOO = LayerPlan(), LayerPlan(frozenset(SIZES.outputs))
ATTENTION_TOO, LEAST = LayerPlan(frozenset({"q_proj", "o_proj"})), LayerPlan(attention=False)


@pytest.mark.parametrize(
    ("budget", "plans"),
    [
        (0, [LEAST] * 3),
        (30, [LEAST] * 3),
        (45, [LEAST, LEAST, FULL]),
        (60, [FULL] * 3),
        (99, [FULL, FULL, ATTENTION_TOO]),
        (120, [ATTENTION_TOO] * 3),
        (245, [ATTENTION_TOO, MLP_TOO, MLP_TOO]),
        (300, [MLP_TOO] * 3),
        (360, [MLP_TOO, MLP_TOO, None]),
        (450, [None] * 3),
    ],
)
def test_a_budget_is_filled_and_never_exceeded(budget: int, plans: list[LayerPlan | None]) -> None:
    found = Planner("selective", budget, 3).decide(SIZES, tokens=1)
    assert found == plans


def test_an_impossible_budget_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    Planner("selective", 3_000, 3).decide(SIZES, tokens=1000)
    assert "the inputs of 3 layers alone take 3e-05 GB" in caplog.text


# --- on a GPU ---
@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["lora", "lora-nf4"])
def test_gradients_on_a_gpu(kind: str, mode: str) -> None:
    model = model_of(kind, hidden_size=256, intermediate_size=512).cuda().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fastpeft.accelerate(model)
    inputs = {name: value.cuda() for name, value in batch(tokens=256).items()}

    def run() -> Any:
        torch.manual_seed(3)
        return gradients(model, inputs)

    loss, grads = run()
    fastpeft.accelerate(model, **MODES[mode])
    for _ in range(3):  # host buffers are used again
        again, others = run()
        assert_exact(again, loss)
        assert (joined(others) - joined(grads)).norm() <= 1e-2 * joined(grads).norm()


@pytest.mark.gpu
def test_what_is_kept_on_a_gpu() -> None:
    """Bytes between forward and backward are those of the plan."""
    model = model_of("lora-nf4", hidden_size=1024, intermediate_size=2048, head_dim=64).cuda().to(torch.bfloat16)
    inputs = {name: value.cuda() for name, value in batch(rows=4, tokens=512).items()}
    fastpeft.accelerate(model)
    stream, attention, layers = 4 * 512 * 1024 * 2, 4 * 512 * 4 * 64 * 2, 4
    kept = {}
    for mode in ("none", "selective", "full", "offload"):
        fastpeft.accelerate(model, checkpointing=mode)
        for _ in range(2):
            model(**inputs).loss.backward()
            model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model(**inputs).loss
        torch.cuda.synchronize()
        kept[mode] = torch.cuda.memory_allocated() - before
        loss.backward()
        model.zero_grad(set_to_none=True)
    assert kept["full"] <= layers * (stream + attention) * 1.1 + 4 * stream  # hidden states and gradient of the loss
    assert kept["offload"] <= stream + attention + 4 * stream
    assert kept["offload"] < kept["full"] < kept["selective"] < kept["none"]
