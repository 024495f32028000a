"""quantize: which layers, in place, without ever holding more than the model and one layer; and the way back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from models.families import batch, tiny
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, get_peft_model
from fastpeft.methods.counting import count
from fastpeft.models import accelerate, dequantize, quantize
from fastpeft.nn import NF4Experts, NF4Linear
from fastpeft.nn.experts import is_experts


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    def make(dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
        settings = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **{**settings, **changes})).to(dtype).eval()

    return make


def names(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is kind}


def test_every_linear_but_the_output_embedding(make_llama: Callable) -> None:
    model = make_llama()
    linear = names(model, nn.Linear)
    assert quantize(model) is model
    assert names(model, nn.Linear) == {"lm_head"}
    assert names(model, NF4Linear) == linear - {"lm_head"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_computes_what_the_dequantised_weights_do(make_llama: Callable, dtype: torch.dtype) -> None:
    tokens = torch.arange(3, 14)[None]
    model = quantize(make_llama(dtype))
    dense = make_llama(dtype)
    for name in names(model, NF4Linear):
        dense.get_submodule(name).weight.data = model.get_submodule(name).dequantize(dtype)
    with torch.no_grad():
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=tolerance, atol=tolerance)


def test_biases_and_mode_stay(make_llama: Callable) -> None:
    model, dense = quantize(make_llama(attention_bias=True)), make_llama(attention_bias=True)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.get_submodule(name).bias, dense.get_submodule(name).bias)
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in quantize(make_llama().train()).modules())


@pytest.mark.parametrize("double_quant", [True, False])
def test_options_reach_the_layers(double_quant: bool) -> None:
    layer = quantize(nn.Sequential(nn.Linear(256, 64)), block_size=128, double_quant=double_quant)[0]
    assert layer.nf4.block_size == 128 and layer.nf4.double_quant is double_quant


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        (["down_proj"], {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
        (["layers.1.mlp"], {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}),
        (
            ["model.layers.0.self_attn.q_proj", "1.self_attn.q_proj"],
            {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)},
        ),
        ("lm_head", set()),
    ],
    ids=["last-part", "subtree", "full-name", "always-skipped"],
)
def test_skip(make_llama: Callable, skip: list[str] | str, dense: set[str]) -> None:
    assert names(quantize(make_llama(), skip=skip), nn.Linear) == {"lm_head", *dense}


def test_shared_weights_stay_shared_and_dense(make_llama: Callable) -> None:
    model = quantize(make_llama(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    tied[1].weight = tied[0].weight
    assert names(quantize(tied), NF4Linear) == {"2"}


def test_one_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(64, 64)
    model = quantize(nn.Sequential(shared, nn.ReLU(), shared))
    assert type(model[0]) is NF4Linear and model[2] is model[0]


def test_a_second_call_does_nothing(make_llama: Callable) -> None:
    model = quantize(make_llama())
    before = dict(model.named_modules())
    quantize(model)
    assert all(module is before[name] for name, module in model.named_modules())


def test_subclasses_and_other_modules_are_left_alone() -> None:
    class Packed(nn.Linear):
        pass

    model = quantize(
        nn.ModuleList([nn.Linear(64, 64), Packed(64, 64), nn.Embedding(8, 64), nn.MultiheadAttention(64, 2)])
    )
    assert names(model, NF4Linear) == {"0"}
    assert type(model[1]) is Packed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"skip": ["down_porj"]},
            "skip names 'down_porj', which matches no module of the model; did you mean 'down_proj'",
        ),
        ({"skip": ["zzz"]}, "'zzz', which matches no module of the model; names end in: model, embed_tokens"),
        ({"block_size": 100}, "block_size=100; must be one of 32, 64, 128"),
    ],
    ids=str,
)
def test_refuses_options(make_llama: Callable, options: dict[str, object], message: str) -> None:
    model = make_llama()
    with pytest.raises(UserError, match=message):
        quantize(model, **options)
    assert not names(model, NF4Linear)


def test_refuses_models(make_llama: Callable) -> None:
    with pytest.raises(UserError, match="on the meta device"):
        quantize(make_llama().to("meta"))
    with pytest.raises(UserError, match="the model has adapters; quantise first"):
        quantize(get_peft_model(make_llama(), LoraConfig()))
    with pytest.raises(UserError, match=r"has no torch\.nn\.Linear to quantise"):
        quantize(nn.Sequential(nn.ReLU()))
    mixed = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.float64))
    with pytest.raises(UserError, match=r"'1' is torch\.float64; NF4 is made from"):
        quantize(mixed)
    assert type(mixed[0]) is nn.Linear


# --- mixtures of experts ---
MIXTURES = ["mixtral", "qwen3-moe", "olmoe"]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch()["input_ids"]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_packed_and_come_back(family: str) -> None:
    """They are nearly all of a mixture's weights, and stayed in 16 bits."""
    dense, model = tiny(family, torch.bfloat16), tiny(family, torch.bfloat16)
    names = {name for name, module in dense.named_modules() if is_experts(module)}
    assert len(names) == 2
    quantize(model)
    assert names == {name for name, module in model.named_modules() if isinstance(module, NF4Experts)}
    big = [p for name in names for p in dense.get_submodule(name).parameters()]
    bytes_of = lambda model: sum(p.nbytes for p in model.parameters())  # noqa: E731
    assert bytes_of(dense) - bytes_of(model) > 0.74 * sum(p.nbytes for p in big)
    assert count(model)[1] == sum(p.numel() for p in dense.parameters())
    out = logits(model)
    dequantize(model)
    for name in names:
        ours, theirs = model.get_submodule(name), dense.get_submodule(name)
        assert type(ours) is type(theirs)
        for weight, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert weight.dtype == torch.bfloat16 and not torch.equal(weight, other)
            torch.testing.assert_close(weight, other, rtol=0, atol=0.2 * float(other.detach().abs().max()))
    torch.testing.assert_close(logits(model), out, rtol=5e-2, atol=5e-2)
    assert not any(isinstance(module, NF4Experts) for module in model.modules())


def test_experts_that_are_left_dense() -> None:
    """Those that skip names, those of another form, and those whose parts are not made of whole blocks."""
    skipped = quantize(tiny("mixtral"), skip=["layers.0.mlp.experts"])
    assert [name for name, m in skipped.named_modules() if isinstance(m, NF4Experts)] == ["model.layers.1.mlp.experts"]
    assert not any(isinstance(m, NF4Experts) for m in quantize(tiny("mixtral"), skip=["experts"]).modules())
    transposed = tiny("gpt-oss", attn_implementation="eager")
    before = {name: p.clone() for name, p in transposed.named_parameters() if "experts" in name}
    quantize(transposed)
    assert before and all(torch.equal(transposed.get_parameter(name), p) for name, p in before.items())
    odd = quantize(tiny("mixtral", intermediate_size=33), block_size=128)  # 64 * 33 is no multiple of 128
    assert not any(isinstance(m, NF4Experts) for m in odd.modules())
    assert any(isinstance(m, NF4Linear) for m in odd.modules())


def test_experts_that_are_not_loaded_are_refused() -> None:
    model = tiny("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to("meta"))
    with pytest.raises(UserError, match=r"the down_proj of 'model\.layers\.1\.mlp\.experts' is on the meta device"):
        quantize(model)
    assert not any(isinstance(m, (NF4Experts, NF4Linear)) for m in model.modules())


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_lora_trains_over_packed_experts(family: str) -> None:
    model = get_peft_model(accelerate(quantize(tiny(family))), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(**batch()).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("mode", ["full", "selective", "offload"])
def test_checkpointing_over_packed_experts_changes_no_gradient(family: str, mode: str) -> None:
    gradients = []
    for checkpointing in ("none", mode):
        model = accelerate(quantize(tiny(family)), checkpointing=checkpointing)
        config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        model = get_peft_model(model, config)
        model(**batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        assert gradient is not None and float(gradient.abs().max()) > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


MEASURE = """
import resource, sys, torch
from fastpeft.models import quantize

LAYERS, SIZE = 12, 4096
block = torch.randn(SIZE, SIZE) / SIZE**0.5
with torch.device("meta"):
    model = torch.nn.Sequential(*(torch.nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
for layer in model:
    layer.weight = torch.nn.Parameter(block.clone())
quantize(torch.nn.Sequential(torch.nn.Linear(SIZE, 64)))  # libraries and thread pools come into memory
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
quantize(model)
print(peak() - before, LAYERS * SIZE * SIZE * 4 // 8)
"""


@pytest.mark.slow
def test_peak_memory_stays_within_the_model_and_one_layer() -> None:
    """Twelve layers of 64 MiB: kept until the end, they would raise the peak by all the codes, 96 MiB and more."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    growth, all_codes = map(int, done.stdout.split())
    one_layer = 4096 * 4096 * 4
    assert growth <= one_layer < all_codes
