"""NF4Experts beside the module whose place it takes, holding the values that the codes stand for."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_exact
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from fastpeft.nn import NF4Experts
from fastpeft.nn.experts import EXPERT_WEIGHTS, is_experts
from fastpeft.ops import nf4_quantize

EXPERTS, HIDDEN, INNER, TOKENS, CHOSEN = 4, 64, 96, 23, 2


def dense(kind: str = "mixtral", act: str = "silu", seed: int = 0) -> nn.Module:
    """A module of transformers with random weights; outputs are O(1)."""
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "hidden_act": act, "experts_implementation": "eager"}
    config: Any
    if kind == "mixtral":
        config = MixtralConfig(**sizes, intermediate_size=INNER, num_local_experts=EXPERTS)
        module: Any = MixtralExperts(config)
    else:
        config = Qwen3MoeConfig(**sizes, moe_intermediate_size=INNER, num_experts=EXPERTS)
        module = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return module.requires_grad_(False)


def inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their experts and shares; one expert has no row."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    scores = torch.randn(TOKENS, EXPERTS, generator=generator)
    scores[:, 2] = -9
    shares, ids = scores.softmax(-1).topk(CHOSEN, dim=-1)
    return x.to(device, dtype).requires_grad_(), ids.to(device), shares.to(device, dtype).requires_grad_()


@pytest.fixture
def experts(device: str) -> NF4Experts:
    return NF4Experts.from_experts(dense().to(device))


def expected(module: nn.Module, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    """The sum over experts in float64, by a module's weights."""
    w1, w2 = (module.get_parameter(name).double() for name in EXPERT_WEIGHTS)
    gate, up = torch.einsum("th,eih->tei", x.double(), w1).chunk(2, -1)
    each = torch.einsum("tei,ehi->teh", module.act_fn(gate) * up, w2)  # type: ignore[operator]
    return (each.gather(1, ids[..., None].expand(-1, -1, HIDDEN)) * shares.double()[..., None]).sum(1)


# --- what it computes ---
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_computes_what_the_dequantised_weights_do(kind: str, act: str, device: str) -> None:
    module = dense(kind, act).to(device)
    packed = NF4Experts.from_experts(module)
    theirs = packed.to_dense()
    assert type(theirs) is type(module) and theirs.config is module.config
    x, ids, shares = inputs(device)
    out, own = packed(x, ids, shares), theirs(x, ids, shares)
    torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double(), expected(theirs, x, ids, shares), rtol=1e-4, atol=1e-4)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
    for ours, other in zip(
        torch.autograd.grad(out, (x, shares), dy), torch.autograd.grad(own, (x, shares), dy), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_is_as_exact_as_the_dense_module(dtype: torch.dtype, device: str) -> None:
    packed = NF4Experts.from_experts(dense().to(device, dtype))
    theirs = packed.to_dense()
    x, ids, shares = inputs(device, dtype)
    with torch.no_grad():
        right = expected(theirs, x, ids, shares)
        errors = [float((out.double() - right).norm()) for out in (packed(x, ids, shares), theirs(x, ids, shares))]
    assert packed(x, ids, shares).dtype == dtype
    assert errors[0] <= 2 * errors[1]


def test_shares_may_be_of_another_dtype(device: str) -> None:
    """Some routers compute in float32; what comes out has the dtype of what goes in, as from transformers' module."""
    packed = NF4Experts.from_experts(dense().to(device, torch.bfloat16))
    x, ids, shares = inputs(device, torch.bfloat16)
    out = packed(x, ids, shares.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, packed.to_dense()(x, ids, shares.float()), rtol=2e-2, atol=2e-2)


def test_under_autocast(device: str) -> None:
    packed = NF4Experts.from_experts(dense().to(device))
    x, ids, shares = inputs(device)
    with torch.autocast(device, torch.bfloat16):
        out = packed(x, ids, shares)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, packed(x, ids, shares), rtol=5e-2, atol=5e-2)


class Clamped(MixtralExperts):
    """As in DeepSeek-V4: a class's own gate, with a setting of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.limit = 0.5

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        out: Tensor = self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)
        return out

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert, (w1, w2) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            share = (top_k_weights * (top_k_index == expert)).sum(1, keepdim=True)
            out = out + share * F.linear(self._apply_gate(F.linear(hidden_states, w1)), w2)
        return out


class Halved(Clamped):
    """Looks alike, and computes something else."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return 0.5 * super().forward(hidden_states, top_k_index, top_k_weights)


def of_class(kind: type[MixtralExperts]) -> nn.Module:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    module = kind(config)
    module.load_state_dict(dense().state_dict())
    return module


def test_a_gate_of_its_own_is_kept(device: str) -> None:
    module = of_class(Clamped).to(device)
    assert is_experts(module)
    packed = NF4Experts.from_experts(module)
    x, ids, shares = inputs(device)
    torch.testing.assert_close(packed(x, ids, shares), packed.to_dense()(x, ids, shares), rtol=1e-4, atol=1e-4)
    assert packed.limit == 0.5


# --- which modules qualify ---
@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_knows_experts_by_what_they_compute(kind: str, where: str) -> None:
    module = dense(kind)
    before = dict(vars(module)), module.state_dict()
    with torch.device(where):  # as transformers builds models
        assert is_experts(module.to(where))
    assert vars(module).keys() == before[0].keys() and module.num_experts == EXPERTS


def test_other_forms_are_no_experts() -> None:
    """Transposed, interleaved and biased weights; another forward; shared among devices; packed already."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4}
    assert not is_experts(GptOssExperts(GptOssConfig(**sizes)))
    assert not is_experts(of_class(Halved))
    module = dense()
    module._is_expert_parallel = True  # type: ignore[assignment]
    assert not is_experts(module)
    module = dense()
    module.down_proj_bias = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))
    assert not is_experts(module)
    assert not is_experts(NF4Experts.from_experts(dense()))
    assert not is_experts(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((4, 128, 64), (4, 64, 32), r"gate_up_proj has shape \(4, 128, 64\) and down_proj \(4, 64, 32\); they must be"),
        ((4, 6, 32), (4, 32, 3), r"gate_up_proj has shape .* must be a multiple of the block size, 128"),
    ],
    ids=["shapes", "blocks"],
)
def test_refuses_weights(first: tuple[int, ...], second: tuple[int, ...], message: str) -> None:
    weights = [nf4_quantize(torch.randn(shape), 128) for shape in (first, second)]
    with pytest.raises(ValueError, match=f"NF4Experts: {message}"):
        NF4Experts(dense(), *weights)


# --- as a module ---
def test_has_what_the_module_had(experts: NF4Experts) -> None:
    original = dense()
    assert experts.num_experts == EXPERTS and experts.hidden_dim == HIDDEN and not experts.is_transposed
    assert type(experts.act_fn) is type(original.act_fn) and isinstance(experts.config, MixtralConfig)
    assert [name for name, _ in experts.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert [name for name, _ in experts.named_modules()] == [name for name, _ in original.named_modules()]
    assert not any(p.requires_grad or p.is_floating_point() for p in experts.parameters())
    assert repr(experts).splitlines()[0] == "NF4Experts("
    assert "experts=4, hidden=64, intermediate=96, block_size=64, scales=double-quantised" in repr(experts)


def test_the_dense_weights_are_let_go_of() -> None:
    module = dense()
    packed = NF4Experts.from_experts(module)
    held = [tensor for tensor in (*packed.parameters(), *packed._shell[0].parameters()) if not tensor.is_meta]
    assert sum(tensor.nbytes for tensor in held) == sum(weight.numel() for weight in module.parameters()) // 2
    assert is_experts(module)  # and the module is as it was


def test_mode_and_dtype_come_back() -> None:
    packed = NF4Experts.from_experts(dense().to(torch.bfloat16).eval())
    assert not packed.training
    back = packed.train().to_dense()
    assert back.training and {weight.dtype for weight in back.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in packed.to_dense(torch.float32).parameters()} == {torch.float32}
    assert not any(weight.requires_grad for weight in back.parameters())


def test_casting_the_model_leaves_the_scales_alone(experts: NF4Experts) -> None:
    before = experts.to_dense(torch.float32).state_dict()
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        experts.to(cast)
        after = experts.to_dense(torch.float32).state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.gpu
def test_moving_to_a_gpu_and_back() -> None:
    packed = NF4Experts.from_experts(dense())
    before = packed.to_dense().state_dict()
    packed.cuda()
    for name, nf4 in packed.packed.items():
        assert all(t is not None and t.is_cuda for t in (nf4.codes, nf4.absmax, nf4.nested_absmax, nf4.offset))
        assert packed.get_parameter(name).data_ptr() == nf4.codes.data_ptr()
    for where in ("cuda", "cpu"):
        after = packed.to(where).to_dense().state_dict()
        assert all(torch.equal(after[name].cpu(), before[name]) for name in before)


def test_meta_device_is_refused(experts: NF4Experts) -> None:
    with pytest.raises(ValueError, match="NF4Experts: a quantised weight cannot be moved to the meta device"):
        experts.to("meta")


def test_copies_share_nothing(experts: NF4Experts, device: str) -> None:
    copied = copy.deepcopy(experts)
    before = experts.to_dense().state_dict()
    copied.gate_up_proj.data.zero_()
    copied.down_proj.data.zero_()
    copied.act_fn, copied.config.hidden_act = nn.ReLU(), "relu"
    after = experts.to_dense().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert experts.config.hidden_act == "silu" and not isinstance(experts.act_fn, nn.ReLU)
    x, ids, shares = inputs(device)
    assert not torch.equal(copied(x, ids, shares), experts(x, ids, shares))


# --- saving and loading ---
_KEYS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")


def test_state_dict_round_trip(experts: NF4Experts, device: str) -> None:
    state = experts.state_dict()
    assert state.keys() == {weight + key for weight in EXPERT_WEIGHTS for key in _KEYS}
    other = NF4Experts.from_experts(dense(seed=3).to(device), block_size=32, double_quant=False)
    other.load_state_dict(state)
    assert {nf4.block_size for nf4 in other.packed.values()} == {64}
    x, ids, shares = inputs(device)
    assert_exact(other(x, ids, shares), experts(x, ids, shares))


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
def test_stores_what_bitsandbytes_does(double_quant: bool, device: str) -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize", reason="bitsandbytes is not installed")
    theirs = dense().to(device)
    for name in EXPERT_WEIGHTS:
        parametrize.replace_parameter_4bit(theirs, name, compress_statistics=double_quant, quant_type="nf4")
    ours, stored = NF4Experts.from_experts(dense().to(device), double_quant=double_quant), theirs.state_dict()
    assert ours.state_dict().keys() == stored.keys()
    for key, value in ours.state_dict().items():
        if "quant_state" in key:
            assert json.loads(bytes(value.tolist())) == json.loads(bytes(stored[key].tolist()))
        else:
            assert torch.equal(value, stored[key]), key
    other = NF4Experts.from_experts(dense(seed=3).to(device))
    other.load_state_dict(stored)
    x, ids, shares = inputs(device)
    assert_exact(other(x, ids, shares), ours(x, ids, shares))


def test_loading_says_what_is_wrong(experts: NF4Experts) -> None:
    state = experts.state_dict()
    gate_only = {key: value for key, value in state.items() if key.startswith("gate_up_proj")}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"down_proj\"\.\s*$"):
        experts.load_state_dict(gate_only)
    with pytest.raises(RuntimeError, match=r"no tensor 'down_proj\.absmax'"):
        experts.load_state_dict({key: value for key, value in state.items() if key != "down_proj.absmax"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "down_proj_bias"'):
        experts.load_state_dict({**state, "down_proj_bias": torch.zeros(1)})
    other = nf4_quantize(torch.randn(EXPERTS, HIDDEN, 2 * INNER)).state_dict(name="down_proj")
    with pytest.raises(RuntimeError, match=r"down_proj has shape \(4, 64, 192\); this layer has \(4, 64, 96\)"):
        experts.load_state_dict({**state, **other})
