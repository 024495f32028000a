"""LoRALinear alone: its formula, several adapters, merging, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerances import SIGMAS, assert_exact, assert_ratio
from torch import nn

from fastpeft.errors import UserError
from fastpeft.nn import LoRALinear, NF4Linear

K, N = 64, 48


def dense(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias).to(dtype)


def quantised(dtype: torch.dtype = torch.float32) -> NF4Linear:
    return NF4Linear.from_linear(dense(dtype=dtype))


def trained(layer: LoRALinear, seed: int = 1) -> LoRALinear:
    """Give B values, as training would, so that the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    for part in layer.lora_B.values():
        part.weight.data.copy_(0.1 * torch.randn(part.weight.shape, generator=generator))
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, K, generator=torch.Generator().manual_seed(2)).to(dtype)


def by_formula(
    layer: LoRALinear, x: torch.Tensor, weight: torch.Tensor, names: list[str], dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """The layer's definition in plain torch."""
    y = nn.functional.linear(x.to(dtype), weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
    for name in names:
        a, b = layer.lora_A[name].weight.to(dtype), layer.lora_B[name].weight.to(dtype)
        y = y + layer.scaling[name] * (x.to(dtype) @ a.t() @ b.t())
    return y


def assert_formula(y: torch.Tensor, layer: LoRALinear, x: torch.Tensor, weight: torch.Tensor, names: list[str]) -> None:
    plain = by_formula(layer, x, weight, names, x.dtype)
    assert_ratio(y, plain, by_formula(layer, x, weight, names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_forward_is_the_formula(device: str, base: str, bias: bool, dtype: torch.dtype) -> None:
    linear = dense(bias, dtype).to(device)
    layer = trained(LoRALinear(linear if base == "dense" else NF4Linear.from_linear(linear), r=4, lora_alpha=6))
    weight = linear.weight if base == "dense" else layer.base_layer.dequantize()
    x = inputs(dtype).to(device)
    y = layer(x)
    assert y.shape == (3, 5, N)
    assert_formula(y, layer, x, weight, ["default"])


def test_new_adapter_changes_nothing() -> None:
    layer = LoRALinear(dense())
    assert_formula(layer(inputs()), layer, inputs(), layer.weight, [])


def test_scaling_is_alpha_over_r_or_its_root() -> None:
    assert LoRALinear(dense(), r=2, lora_alpha=6).scaling == {"default": 3.0}
    assert LoRALinear(dense(), r=2, lora_alpha=6, use_rslora=True).scaling["default"] == pytest.approx(4.242640687)


def test_adapters_stay_fp32_over_a_bf16_base() -> None:
    layer = trained(LoRALinear(dense(dtype=torch.bfloat16)))
    y = layer(inputs(torch.bfloat16))
    assert layer.lora_A["default"].weight.dtype == layer.lora_B["default"].weight.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


def test_two_active_adapters_add_up() -> None:
    layer = LoRALinear(dense(), r=4)
    layer.add_adapter("second", r=2, lora_alpha=3)
    layer.active_adapters = ["default", "second"]
    y = trained(layer)(inputs())
    assert_formula(y, layer, inputs(), layer.weight, ["default", "second"])
    y.sum().backward()
    assert all(parameter.grad is not None for name, parameter in layer.named_parameters() if "lora_" in name)


def test_an_active_name_the_layer_lacks_is_passed_over() -> None:
    linear = dense()
    layer = trained(LoRALinear(linear, "one"))
    layer.active_adapters = ["other"]
    assert_exact(layer(inputs()), linear(inputs()))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_gradients_are_those_of_the_formula(device: str, base: str) -> None:
    layer = trained(LoRALinear(dense() if base == "dense" else quantised(), r=4, lora_alpha=6)).to(device)
    weight = layer.weight if base == "dense" else layer.base_layer.dequantize(torch.float32)
    x = inputs().to(device).requires_grad_()
    parameters = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    direction = torch.randn(3, 5, N, generator=torch.Generator().manual_seed(3)).to(device)

    def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((y * direction.to(y.dtype)).sum(), parameters)

    reference = by_formula(layer, *(t.double() for t in (x, weight)), ["default"])
    plain = by_formula(layer, x, weight, ["default"], x.dtype)
    for got, ordinary, exact in zip(gradients(layer(x)), gradients(plain), gradients(reference), strict=True):
        assert_ratio(got, ordinary, exact)
    assert not layer.weight.requires_grad


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    layer = trained(LoRALinear(dense(), lora_dropout=0.5))
    x = inputs()[:1, :1].expand(2000, 1, K)
    layer.eval()
    still = layer(x)
    assert torch.equal(still[0], still[1])
    layer.train()
    noisy = layer(x)
    assert not torch.allclose(noisy[0], noisy[1])
    low_rank = (noisy - layer.base_layer(x)).flatten(0, 1)
    deviation = (low_rank.mean(0) - (still - layer.base_layer(x))[0, 0]).abs()
    assert (deviation < SIGMAS * low_rank.std(0) / 2000**0.5).all()


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_merged_equals_unmerged(device: str, base: str) -> None:
    layer = LoRALinear(dense() if base == "dense" else quantised(), r=4)
    layer.add_adapter("second", r=2, lora_alpha=3)
    trained(layer).to(device).active_adapters = ["default", "second"]
    weight = layer.weight if base == "dense" else layer.base_layer.dequantize()
    x = inputs().to(device)
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == ["default", "second"]
    for merged in (layer(x), layer.to_dense()(x)):
        assert_formula(merged, layer, x, weight, ["default", "second"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unmerge_is_exact_and_base_never_moves(dtype: torch.dtype) -> None:
    layer = trained(LoRALinear(dense(dtype=dtype)))
    weight, output = layer.weight.clone(), layer(inputs(dtype))
    layer.merge()
    assert_exact(layer.weight, weight)
    layer.unmerge()
    assert layer.merged_adapters == []
    assert_exact(layer(inputs(dtype)), output)


def test_disabled_is_the_base_even_when_merged() -> None:
    linear = dense()
    layer = trained(LoRALinear(linear))
    layer.adapters_disabled = True
    assert_exact(layer(inputs()), linear(inputs()))
    layer.merge()
    assert_exact(layer(inputs()), linear(inputs()))


def test_nf4_base_merges_to_the_dtype_it_was_made_from() -> None:
    merged = trained(LoRALinear(quantised(torch.bfloat16))).to_dense()
    assert type(merged) is nn.Linear
    assert merged.weight.dtype == torch.bfloat16
    assert merged.weight.shape == (N, K)


def test_a_shared_weight_is_not_changed_by_merging() -> None:
    linear = dense()
    tied = nn.Embedding(N, K)
    tied.weight = linear.weight
    layer = trained(LoRALinear(linear))
    before = tied.weight.clone()
    merged = layer.to_dense()
    assert merged.weight is not tied.weight
    assert_exact(tied.weight, before)


def test_safe_merge_refuses_nan_and_changes_nothing() -> None:
    layer = trained(LoRALinear(dense()))
    layer.lora_B["default"].weight.data[3, 1] = float("nan")
    with pytest.raises(UserError, match="NaN or Inf"):
        layer.merge(safe_merge=True)
    assert layer.merged_weight is None


def test_state_dict_has_pefts_names_and_no_merged_weight() -> None:
    layer = LoRALinear(dense())
    layer.merge()
    assert list(layer.state_dict()) == [
        "base_layer.weight",
        "base_layer.bias",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]


@pytest.mark.parametrize(
    ("init", "a_std", "b_is_zero"),
    [(True, 1 / (3 * K) ** 0.5, True), ("gaussian", 1 / 16, True), (False, 1 / (3 * K) ** 0.5, False)],
    ids=["default", "gaussian", "random"],
)
def test_initial_values(init: bool | str, a_std: float, b_is_zero: bool) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(dense(), r=16, init_lora_weights=init)
    assert layer.lora_A["default"].weight.std().item() == pytest.approx(a_std, rel=0.1)
    assert (layer.lora_B["default"].weight == 0).all().item() is b_is_zero


def test_delete_adapter_unmerges_and_leaves_the_base() -> None:
    linear = dense()
    layer = trained(LoRALinear(linear))
    layer.merge()
    layer.delete_adapter("default")
    assert_exact(layer(inputs()), linear(inputs()))
    assert layer.r == layer.scaling == {}


def test_training_mode_is_the_bases() -> None:
    assert LoRALinear(dense().eval()).training is False
    assert LoRALinear(dense().train()).training is True


def test_deepcopy_is_independent() -> None:
    layer = trained(LoRALinear(dense()))
    twin = copy.deepcopy(layer)
    nn.init.zeros_(twin.lora_B["default"].weight)
    assert not torch.allclose(layer(inputs()), twin(inputs()))


def test_autocast_gives_autocasts_dtype() -> None:
    layer = trained(LoRALinear(dense()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(inputs())
    assert y.dtype == torch.bfloat16
    plain = by_formula(layer, inputs(), layer.weight, ["default"], torch.bfloat16)
    assert_ratio(y, plain, by_formula(layer, inputs(), layer.weight, ["default"]))


def test_reads_like_a_linear_layer() -> None:
    layer = LoRALinear(dense(bias=False))
    assert (layer.in_features, layer.out_features, layer.bias) == (K, N, None)
    assert layer.weight is layer.base_layer.weight
    assert "default(r=8, scaling=1)" in repr(layer)


class _Subclass(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "module",
    [nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), _Subclass(4, 4), nn.MultiheadAttention(4, 2).out_proj],
    ids=["embedding", "conv", "own-forward", "attention-out_proj"],
)
def test_refuses_what_is_not_a_plain_linear_layer(module: nn.Module) -> None:
    with pytest.raises(UserError, match="cannot adapt"):
        LoRALinear(module)


@pytest.mark.parametrize("options", [{"r": 0}, {"lora_dropout": 1.0}, {"init_lora_weights": "eva"}], ids=str)
def test_refuses_numbers_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="needs r >= 1"):
        LoRALinear(dense(), **options)


def test_refuses_a_second_adapter_of_one_name() -> None:
    with pytest.raises(UserError, match="already has an adapter named 'default'"):
        LoRALinear(dense()).add_adapter("default", r=8, lora_alpha=8)
