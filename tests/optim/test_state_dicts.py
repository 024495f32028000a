"""State dicts: resuming to the bit, and from and into torch's and bitsandbytes' optimizers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from optim.problems import BIG_SHAPES, FAMILY, Params, assert_same_bits, gradients, parameters, run
from tolerances import assert_exact, assert_optimizer, relative_error

from fastpeft.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, formats
from fastpeft.trainers.state import load_state, save_state

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def trained(make: Any, device: str, dtype: torch.dtype = torch.float32, steps: int = 5) -> tuple[Any, Params]:
    params = parameters(device, dtype, BIG_SHAPES)
    optimizer = make(params, **OPTIONS)
    run(optimizer, params, range(steps))
    return optimizer, params


def resumed(make: Any, saved: dict[str, Any], params: Params) -> tuple[Any, Params]:
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = make(copies, lr=5.0)
    optimizer.load_state_dict(saved)
    return optimizer, copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", FAMILY)
def test_a_resumed_run_goes_on_to_the_bit(make: Any, dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    """Through files, as the trainers save them; torch's loader would cast moments to the parameter's dtype."""
    optimizer, params = trained(make, device, dtype)
    save_state(optimizer.state_dict(), tmp_path, "optimizer")
    restored, copies = resumed(make, load_state(tmp_path, "optimizer"), params)
    assert restored.param_groups[0]["lr"] == OPTIONS["lr"]
    run(optimizer, params, range(5, 8))
    run(restored, copies, range(5, 8))
    assert_same_bits(params, copies)


@pytest.mark.parametrize("make", FAMILY)
def test_loading_does_not_hold_on_to_what_was_loaded(make: Any, device: str) -> None:
    optimizer, params = trained(make, device)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    restored, copies = resumed(make, saved, params)
    run(restored, copies, range(5, 8))
    for key, entry in saved["state"].items():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                assert_exact(value, kept["state"][key][name])


@pytest.mark.parametrize("make", FAMILY)
def test_parameters_without_state_start_anew(make: Any, device: str) -> None:
    _, params = trained(make, device)
    restored, copies = resumed(make, make(params).state_dict(), params)
    run(restored, copies, [9])
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    run(make(fresh), fresh, [9])
    assert_same_bits(copies, fresh)


@pytest.mark.parametrize("make", [AdamW, PagedAdamW])
def test_from_torch(make: Any, device: str) -> None:
    theirs, params = trained(torch.optim.AdamW, device)
    ours, copies = resumed(make, theirs.state_dict(), params)
    run(theirs, params, range(5, 30))
    run(ours, copies, range(5, 30))
    for p, q in zip(params, copies, strict=True):
        assert_optimizer(q, p)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [AdamW, PagedAdamW])
def test_into_torch(make: Any, fused: bool, device: str) -> None:
    ours, params = trained(make, device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.AdamW(copies, fused=fused)
    saved = copy.deepcopy(ours.state_dict())  # torch's optimizers go on with the very tensors that they load
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    theirs.load_state_dict(saved)
    run(theirs, copies, range(5, 30))
    run(ours, params, range(5, 30))
    for p, q in zip(params, copies, strict=True):
        assert_optimizer(p, q)


def bnb(name: str, device: str) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return getattr(bitsandbytes.optim, name)


@pytest.mark.parametrize("make", [AdamW8bit, PagedAdamW8bit])
@pytest.mark.parametrize("steps", [0, 3], ids=["at once", "after steps"])
def test_from_bitsandbytes(make: Any, steps: int, device: str) -> None:
    """Tensors below 4096 elements have 32-bit state there."""
    theirs, params = trained(bnb("AdamW8bit", device), device)
    saved = theirs.state_dict()
    ours, copies = resumed(make, saved, params)
    written = ours.state_dict()["state"]
    for key, entry in saved["state"].items():
        entry = {**entry, **entry.get("__bnb_optimizer_quant_state__", {})}
        assert written[key]["step"] == entry["step"] == 5
        for name in entry.keys() & {"state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"}:
            assert_exact(written[key][name].cpu(), entry[name].cpu())
    run(theirs, params, range(5, 5 + steps))
    run(ours, copies, range(5, 5 + steps))
    for p, q in zip(params, copies, strict=True):
        assert relative_error(q, p) < 5e-3  # theirs steps with moments that were rounded to codes


@pytest.mark.parametrize("make", [AdamW8bit, PagedAdamW8bit])
def test_into_bitsandbytes(make: Any, device: str) -> None:
    ours, params = trained(make, device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = bnb("AdamW8bit", device)(copies)
    saved = copy.deepcopy(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    written = theirs.state_dict()["state"]
    for key, entry in saved["state"].items():
        of_theirs = {**written[key], **written[key].get("__bnb_optimizer_quant_state__", {})}
        assert of_theirs.keys() - {"__bnb_optimizer_quant_state__"} == entry.keys()
        assert_exact(of_theirs["state1"].cpu(), entry["state1"].cpu())
    run(theirs, copies, range(5, 8))
    run(ours, params, range(5, 8))
    for p, q in zip(params, copies, strict=True):
        assert relative_error(p, q) < 5e-3


@pytest.mark.parametrize("make", [AdamW, PagedAdamW])
def test_from_bitsandbytes_of_32_bits(make: Any, device: str) -> None:
    theirs, params = trained(bnb("AdamW32bit", device), device)
    ours, _ = resumed(make, theirs.state_dict(), params)
    entry = theirs.state[params[0]]
    assert_exact(ours.state_dict()["state"][0]["exp_avg"].cpu(), entry["state1"].cpu())


def test_between_bits(device: str) -> None:
    """8 bits become 32 exactly. 32 become 8 by rounding, not always to what they were: a map ends at 1 and -0.993."""
    eight, params = trained(AdamW8bit, device)
    thirty_two, copies = resumed(AdamW, eight.state_dict(), params)
    back, _ = resumed(AdamW8bit, thirty_two.state_dict(), copies)
    for key, entry in eight.state_dict()["state"].items():
        middle, end = thirty_two.state_dict()["state"][key], back.state_dict()["state"][key]
        assert middle["step"] == end["step"] == entry["step"]
        shape = entry["state1"].shape
        for name, moment in (("state1", "exp_avg"), ("state2", "exp_avg_sq")):
            if "absmax1" not in entry:
                assert_exact(middle[moment], entry[name])
                continue
            one, other = (_decoded(state, name).view(shape) for state in (entry, end))
            assert_exact(middle[moment], one)
            assert relative_error(other, one) < 0.02  # what rounding to 8 bits costs


def _decoded(entry: dict[str, Any], name: str) -> torch.Tensor:
    number = name[-1]
    return formats.decode(entry[name].flatten(), entry[f"absmax{number}"], entry[f"qmap{number}"])


def test_codes_of_another_map_are_read_by_it() -> None:
    values = formats.dynamic_map(True).flip(0)
    codes, absmax = torch.arange(256, dtype=torch.uint8).repeat(3)[:700], torch.tensor([1.0, 2.0, 4.0])
    entry = {"step": 3, "state1": codes, "state2": codes, "absmax1": absmax, "absmax2": absmax}
    entry |= {"qmap1": values, "qmap2": formats.dynamic_map(False)}
    saved = formats.read(entry, torch.Size([700]), "test")
    expected = values[codes.int()] * absmax.repeat_interleave(256)[:700]
    assert_exact(saved.as_float32().exp_avg, expected)
    assert not torch.equal(saved.as_eight_bit().exp_avg, codes)
    again = formats.decode(saved.as_eight_bit().exp_avg, saved.as_eight_bit().absmax, formats.dynamic_map(True))  # type: ignore[arg-type]
    assert_exact(again, expected)


@pytest.mark.parametrize("numel", [1, 255, 256, 257, 1000])
def test_encoding_takes_the_nearest_value(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_READ_CHUNK", 512)  # so that it takes several
    moment, values = torch.randn(numel), formats.dynamic_map(True)
    codes, absmax = formats.encode(moment, values)
    scale = absmax.repeat_interleave(256)[:numel]
    nearest = ((moment / scale)[:, None] - values).abs().min(dim=1).values
    assert torch.equal(absmax[0], moment[:256].abs().max())
    error = (moment / scale - values[codes.int()]).abs()
    assert bool((error <= nearest + 1e-6).all())
    assert_exact(formats.decode(codes, absmax, values), values[codes.int()] * scale)


def test_an_all_zero_block_encodes_to_zero() -> None:
    codes, absmax = formats.encode(torch.zeros(300), formats.dynamic_map(False))
    assert_exact(formats.decode(codes, absmax, formats.dynamic_map(False)), torch.zeros(300))


def test_hooks_see_the_state_as_it_is_saved() -> None:
    optimizer, params = trained(AdamW8bit, "cpu")
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, state_dict: seen.append(state_dict["state"][0]["step"]))
    saved = optimizer.state_dict()
    assert seen == [5]
    restored, _ = resumed(AdamW8bit, saved, params)
    restored.register_load_state_dict_pre_hook(lambda _, state_dict: {**state_dict, "state": {}})
    restored.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    restored.load_state_dict(saved)
    assert not restored.state_dict()["state"] and seen[-1] == "after"


def test_names_stay_those_of_the_optimizer_and_options_of_torch_are_kept() -> None:
    model = torch.nn.Linear(3, 2)
    ours = AdamW(list(model.named_parameters()), lr=1e-2)
    theirs = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters(), lr=0.3, maximize=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(theirs, factor=0.5)
    ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert group["param_names"] == ["weight", "bias"]
    assert group["maximize"] and group["initial_lr"] == 0.3 and scheduler is not None
    gradients(list(model.parameters()), 0)
    ours.step()


@pytest.mark.gpu
def test_paged_state_is_saved_on_the_cpu() -> None:
    """All but that of parameters too small for 8 bits."""
    for make in (PagedAdamW, PagedAdamW8bit):
        params = parameters("cuda", shapes=BIG_SHAPES)
        optimizer = make(params, device_budget_bytes=0)
        run(optimizer, params, range(2))
        for entry in optimizer.state_dict()["state"].values():
            if make is PagedAdamW8bit and entry["state1"].numel() < 4096:
                continue
            devices = {value.device.type for value in entry.values() if isinstance(value, torch.Tensor)}
            assert "cpu" in devices
