"""NF4Linear as a module: casting, moving, copying, saving and loading."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerances import assert_exact
from torch import nn

from fastpeft.nn import LoRALinear, NF4Linear


@pytest.fixture
def layer(device: str) -> NF4Linear:
    return NF4Linear.from_linear(nn.Linear(64, 32, device=device))


def test_takes_the_place_of_a_dense_layer(layer: NF4Linear, device: str) -> None:
    x = torch.randn(2, 3, 64, device=device)
    assert layer(x).shape == (2, 3, 32)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))
    assert not any(p.requires_grad for p in layer.parameters())
    assert repr(layer) == (
        "NF4Linear(in_features=64, out_features=32, bias=True, block_size=64, scales=double-quantised)"
    )


def test_casting_the_model_leaves_the_scales_alone(layer: NF4Linear) -> None:
    """``model.half()`` casts every floating tensor it finds; cast scales would change every weight silently."""
    before = layer.dequantize(torch.float32)
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        layer.to(cast)
        assert_exact(layer.dequantize(torch.float32), before)
    assert layer.bias is not None and layer.bias.dtype == torch.float32


@pytest.mark.gpu
def test_moving_to_a_gpu_and_back() -> None:
    layer = NF4Linear.from_linear(nn.Linear(64, 32))
    before = layer.dequantize()
    layer.cuda()
    assert all(t.is_cuda for t in (layer.weight, layer.nf4.codes, layer.nf4.absmax, layer.nf4.offset))
    assert layer.weight.data_ptr() == layer.nf4.codes.data_ptr()
    assert_exact(layer.dequantize().cpu(), before)
    assert_exact(layer.cpu().dequantize(), before)


def test_state_dict_round_trip(layer: NF4Linear, device: str) -> None:
    other = NF4Linear.from_linear(nn.Linear(64, 32, device=device), block_size=128, double_quant=False)
    other.load_state_dict(layer.state_dict())
    assert_exact(other.dequantize(), layer.dequantize())
    assert other.nf4.block_size == 64
    x = torch.randn(2, 64, device=device)
    assert_exact(other(x), layer(x))


def test_loads_what_bitsandbytes_saves(device: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    dense = nn.Linear(64, 32)
    theirs = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compress_statistics=True)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to(device)
    if theirs.weight.quant_state is None:
        theirs.weight = theirs.weight._quantize(torch.device(device))
    ours = NF4Linear.from_linear(nn.Linear(64, 32, device=device))
    ours.load_state_dict(theirs.state_dict())
    expected = NF4Linear.from_linear(dense.to(device))
    assert_exact(ours.dequantize(torch.float32), expected.dequantize(torch.float32))
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())


def test_loading_says_what_is_wrong(layer: NF4Linear, device: str) -> None:
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match=r"no tensor 'weight.quant_map'|no tensor 'weight.absmax'"):
        layer.load_state_dict({key: value for key, value in state.items() if key != "weight.absmax"})
    other = NF4Linear.from_linear(nn.Linear(128, 32, device=device))
    with pytest.raises(RuntimeError, match=r"weight has shape \(32, 128\); this layer has \(32, 64\)"):
        layer.load_state_dict(other.state_dict())


def test_copies_share_nothing(layer: NF4Linear) -> None:
    copied = copy.deepcopy(layer)
    before = layer.dequantize()
    copied.weight.data.zero_()
    assert_exact(layer.dequantize(), before)
    assert not torch.equal(copied.dequantize(), before)


def test_meta_device_is_refused(layer: NF4Linear) -> None:
    with pytest.raises(ValueError, match="cannot be moved to the meta device"):
        layer.to("meta")


@pytest.mark.parametrize("adapted", [False, True], ids=["nf4", "lora"])
def test_the_output_may_be_changed_in_place(adapted: bool, device: str) -> None:
    """``y += residual`` raised: the ops returned a view, which autograd does not let anybody change."""
    layer = NF4Linear.from_linear(nn.Linear(64, 32)).to(device)
    module = LoRALinear(layer, r=4, init_lora_weights=False) if adapted else layer
    x = torch.randn(2, 3, 64, device=device, requires_grad=True)
    expected = torch.autograd.grad((module(x) + 1).pow(2).sum(), x)
    y = module(x)
    y += 1
    assert torch.equal(torch.autograd.grad(y.pow(2).sum(), x)[0], expected[0])
