"""The other adapter modules alone: their formulas in plain torch, and what they leave as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import UserError
from fastpeft.nn import (
    BottleneckAdapter,
    BottleneckSite,
    IA3Linear,
    LoRAEmbedding,
    LoRALinear,
    NF4Linear,
    PromptEncoder,
    Prompts,
    SoftPrompt,
)
from fastpeft.nn.lora_init import loftq_start, principal_start
from fastpeft.ops import nf4_dequantize

K, N = 64, 48
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def moved(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return module


# Bottlenecks.


class Sublayer(nn.Module):
    """Answers with a tuple, as attention does, or with a tensor."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.linear, self.as_tuple = nn.Linear(K, K), as_tuple

    def forward(self, hidden_states: Tensor) -> Any:
        out = self.linear(hidden_states)
        return (out, "weights") if self.as_tuple else out


def bottleneck_by_formula(adapter: BottleneckAdapter, x: Tensor) -> Tensor:
    y = x
    if adapter.adapter_norm_before is not None:
        norm = adapter.adapter_norm_before
        y = F.layer_norm(y, (K,), norm.weight, norm.bias)
    down = adapter.adapter_down[0]
    hidden = F.silu(y @ down.weight.t() + down.bias)
    y = (hidden @ adapter.adapter_up.weight.t() + adapter.adapter_up.bias) * adapter.scaling
    if adapter.adapter_norm_after is not None:
        norm = adapter.adapter_norm_after
        y = F.layer_norm(y, (K,), norm.weight, norm.bias)
    return y


@pytest.mark.parametrize("by_name", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("as_tuple", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("parallel", [False, True], ids=["after", "beside"])
@pytest.mark.parametrize("norms", [(False, False), (True, True)], ids=["bare", "norms"])
def test_a_site_adds_to_its_sublayer(norms: tuple[bool, bool], parallel: bool, as_tuple: bool, by_name: bool) -> None:
    sublayer = Sublayer(as_tuple)
    site = BottleneckSite(sublayer)
    for name, scaling in (("one", 2.0), ("two", "learned")):
        site.add_adapter(name, moved(BottleneckAdapter(K, 8, "swish", *norms, scaling=scaling)), parallel)
    site.active_adapters = ["one", "two"]
    x = torch.randn(2, 5, K)
    h = sublayer.linear(x)
    expected = h + sum(bottleneck_by_formula(a, x if parallel else h) for a in site.adapters.values())
    answer = sublayer(hidden_states=x) if by_name else sublayer(x)
    if as_tuple:
        answer, rest = answer
        assert rest == "weights"
    torch.testing.assert_close(answer, expected, **CLOSE)
    site.leave(sublayer)
    left = sublayer(x)
    assert torch.equal(left[0] if as_tuple else left, h)
    assert not sublayer._forward_hooks and not sublayer._forward_hooks_with_kwargs


@pytest.mark.parametrize("init", ["zero", "xavier", "bert"])
def test_how_a_bottleneck_begins(init: str) -> None:
    adapter, x = BottleneckAdapter(K, 8, init=init), torch.randn(3, K)
    assert (adapter(x) == 0).all().item() == (init != "bert")
    if init == "bert":
        assert adapter.adapter_up.weight.detach().std() == pytest.approx(0.02, rel=0.3)


def test_a_copied_layer_has_adapters_of_its_own() -> None:
    layer = nn.Module()
    layer.mlp = Sublayer(False)
    layer.output_adapters = BottleneckSite(layer.mlp)
    layer.output_adapters.add_adapter("one", moved(BottleneckAdapter(K, 8)), False)
    layer.output_adapters.active_adapters = ["one"]
    x = torch.randn(2, K)
    before, copied = layer.mlp(x), copy.deepcopy(layer)
    moved(layer.output_adapters)
    assert torch.equal(copied.mlp(x), before) and not torch.equal(layer.mlp(x), before)


# (IA)^3.


def linear(kind: str) -> nn.Module:
    if kind == "conv1d":
        return Conv1D(N, K)
    return NF4Linear.from_linear(nn.Linear(K, N)) if kind == "nf4" else nn.Linear(K, N)


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("kind", ["dense", "nf4", "conv1d"])
def test_vectors_scale_output_or_input(kind: str, feedforward: bool) -> None:
    base = linear(kind)
    layer = IA3Linear(base, feedforward)
    for name in ("one", "two"):
        layer.add_adapter(name, init_ia3_weights=False)
    layer.active_adapters = ["one", "two"]
    x = torch.randn(2, 5, K)
    scale = layer.ia3_l["one"].flatten() * layer.ia3_l["two"].flatten()
    expected = base(x * scale) if feedforward else base(x) * scale
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    dense = layer.to_dense()
    assert type(dense) is (Conv1D if kind == "conv1d" else nn.Linear)
    torch.testing.assert_close(dense(x), expected, rtol=1e-4, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer.delete_adapter("one")
    assert layer.merged_weight is None and layer.held() == ["two"]


def test_lora_over_a_transposed_weight() -> None:
    base = Conv1D(N, K)
    layer = moved(LoRALinear(base, r=4, lora_alpha=6))
    x = torch.randn(2, 5, K)
    a, b = layer.factors("default")
    expected = base(x) + 1.5 * x @ a.t() @ b.t()
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    dense = layer.to_dense()
    assert (
        isinstance(dense, Conv1D) and dense.weight.shape == (K, N) and base.weight.data_ptr() != dense.weight.data_ptr()
    )
    torch.testing.assert_close(dense(x), expected, **CLOSE)
    assert layer.in_features == K and layer.out_features == N


# Embeddings.


class Scaled(nn.Embedding):
    embed_scale = torch.tensor(3.0)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_embedding_is_the_formula(kind: type[nn.Embedding]) -> None:
    base = kind(20, K, padding_idx=0)
    layer = LoRAEmbedding(base)
    for name in ("one", "two"):
        layer.add_adapter(name, 4, 6, init_lora_weights=False)
    layer.active_adapters = ["one", "two"]
    ids = torch.tensor([[3, 0, 19], [7, 7, 1]])
    expected = base(ids)
    for name in ("one", "two"):
        a, b = layer.factors(name)
        expected = expected + 1.5 * (a.t()[ids] @ b.t()) * getattr(base, "embed_scale", 1.0)
    torch.testing.assert_close(layer(ids), expected, rtol=1e-4, atol=1e-5)
    assert layer.num_embeddings == 20 and layer.embedding_dim == K and layer.padding_idx == 0
    dense = layer.to_dense()
    assert type(dense) is kind
    torch.testing.assert_close(dense(ids), expected, rtol=1e-4, atol=1e-5)
    before = base.weight.detach().clone()
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(ids), expected, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert torch.equal(base.weight, before) and layer.merged_weight is None
    layer.lora_embedding_B["one"].data[0, 0] = float("inf")
    with pytest.raises(UserError, match="NaN or Inf"):
        layer.merge(safe_merge=True)
    with pytest.raises(UserError, match="cannot adapt a Linear"):
        LoRAEmbedding(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_dora_gives_the_columns_of_a_table_their_lengths(kind: type[nn.Embedding]) -> None:
    base = kind(20, K)
    layer = LoRAEmbedding(base)
    layer.add_adapter("dora", 4, 6, use_dora=True)
    layer.active_adapters = ["dora"]
    ids = torch.tensor([[3, 0, 19], [7, 7, 1]])
    torch.testing.assert_close(layer(ids), base(ids), rtol=0, atol=0)
    a, b = layer.factors("dora")
    lengths = layer.lora_magnitude_vector["dora"].weight
    with torch.no_grad():
        a.normal_()
        lengths.mul_(torch.rand_like(lengths) + 0.5)
    table = base.weight.detach() + 1.5 * (b @ a).t()
    scale = getattr(base, "embed_scale", 1.0)
    expected = scale * (table / table.detach().norm(dim=0) * lengths)[ids]
    torch.testing.assert_close(layer(ids), expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(expected)
    parts = [a, b, lengths]
    for found, wanted in zip(
        torch.autograd.grad((layer(ids) * weights).sum(), parts),
        torch.autograd.grad((expected * weights).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert {tuple(t.shape) for t in layer.extra_parameters("dora")} == {(K,)}
    torch.testing.assert_close(layer.to_dense()(ids), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        base.weight.mul_(2)
    layer.load("dora", {})  # what is known of the base is taken anew
    table = base.weight + 1.5 * (b @ a).t()
    expected = scale * (table / table.norm(dim=0) * lengths)[ids]
    torch.testing.assert_close(layer(ids), expected, rtol=1e-4, atol=1e-5)
    layer.delete_adapter("dora")
    assert not [name for name, _ in layer.named_parameters() if "base" not in name]


# Virtual tokens.


def test_encoders_are_their_formulas() -> None:
    nemo = PromptEncoder(500, 32, "NEMO", 16, table_width=24)
    assert nemo.embedding.weight.detach().std() == pytest.approx(0.023, rel=0.05)
    first, _, second = nemo.mlp_head
    torch.testing.assert_close(nemo(), second(F.gelu(first(nemo.embedding.weight))))
    mlp = PromptEncoder(3, 32, "MLP", 16)
    one, _, two, _, three = mlp.mlp_head
    torch.testing.assert_close(mlp(), three(F.relu(two(F.relu(one(mlp.embedding.weight))))))
    lstm = PromptEncoder(3, 32, "LSTM", 16)
    assert lstm().shape == (3, 32) and lstm.lstm_head.bidirectional and lstm.lstm_head.num_layers == 2
    with pytest.raises(UserError, match="kind is 'RNN'"):
        PromptEncoder(3, 32, "RNN")


def test_prompts_of_several_adapters_stand_in_order() -> None:
    prompts = Prompts()
    for name, count in (("one", 2), ("two", 3)):
        prompts.add_adapter(name, SoftPrompt(torch.randn(count, 8)))
    prompts.active_adapters = ["two", "one"]
    tokens = prompts.tokens(4)
    assert tokens.shape == (4, 5, 8)
    assert torch.equal(tokens[1, :3], prompts.prompt("two").embedding.weight)
    prompts.adapters_disabled = True
    assert prompts.tokens(4) is None


# Starts.


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_8", "olora"])
def test_principal_starts(how: str) -> None:
    weight = torch.randn(N, 8) @ torch.randn(8, K) + 0.01 * torch.randn(N, K)
    a, b = principal_start(weight, 8, 0.5, how)
    assert a.shape == (8, K) and b.shape == (N, 8) and a.is_contiguous() and b.is_contiguous()
    part = 0.5 * b @ a if how != "olora" else b @ a
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    best = (u[:, :8] * s[:8]) @ vh[:8]
    if how == "olora":
        torch.testing.assert_close(part, b @ (b.t() @ weight), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(part, best, rtol=0.02, atol=0.02)
    with pytest.raises(UserError, match="r=49 is greater than the smaller side"):
        principal_start(weight, 49, 1.0, how)


def test_loftq_gets_nearer_with_each_turn() -> None:
    weight = torch.randn(N, K)
    errors = []
    for turns in (1, 2, 5):
        packed, a, b = loftq_start(weight, torch.float32, 8, 2.0, turns)
        errors.append(float((nf4_dequantize(packed, torch.float32) + 2.0 * b @ a - weight).norm()))
    assert errors[2] < errors[1] < errors[0]


def test_a_start_in_the_base_leaves_the_output_and_the_base() -> None:
    base = nn.Linear(K, N)
    before, x = base.weight.detach().clone(), torch.randn(3, K)
    layer = LoRALinear(base, r=4, init_lora_weights="pissa")
    torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(base.weight, before) and not layer.is_product("default")
    assert {name: shape[0] for name, shape in layer.saved_shapes("default").items()} == {
        "lora_A.weight": 8,
        "lora_B.weight": N,
    }
