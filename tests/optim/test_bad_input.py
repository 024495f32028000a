"""What cannot be taken is refused by name, and nothing is half updated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.problems import FAMILY, Params, gradients, parameters
from torch import nn

from fastpeft.optim import AdamW, PagedAdamW

SHAPES = [(4, 3), (5,)]


def named(device: str = "cpu") -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model, and its parameters in two groups with their names; the second is the one that tests break."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False)).to(device)
    pairs = list(model.named_parameters())
    return model, [{"params": pairs[:1]}, {"params": pairs[1:]}]


def broken(what: str, param: nn.Parameter) -> None:
    """Break a parameter, or its gradient, in one way."""
    if what == "sparse gradient":
        param.grad = torch.eye(5, 4).to_sparse()
    elif what == "other strides":
        param.data = param.data.t().contiguous().t()
    elif what == "another dtype":
        param.data = param.data.double()
    elif what == "another shape":
        param.data = param.data[:2].clone()
    elif what == "another device":
        param.data = param.data.to("cuda")
    elif what == "gradient of another shape":
        assert param.grad is not None
        param.grad.data = torch.ones(4, 5)
    elif what == "gradient of another dtype":
        assert param.grad is not None
        param.grad.data = param.grad.data.double()


MESSAGES = {
    "sparse gradient": r"the gradient of 1\.weight is sparse \(torch\.sparse_coo\)",
    "other strides": r"1\.weight was changed after the optimizer was made: it is not contiguous \(strides \(1, 5\)\)",
    "another dtype": r"1\.weight was changed .*: it was torch\.float32 of shape \(5, 4\) on cpu and is torch\.float64",
    "another shape": r"1\.weight was changed .*\(5, 4\) on cpu and is torch\.float32 of shape \(2, 4\)",
    "gradient of another shape": r"the gradient of 1\.weight has shape \(4, 5\) and the parameter \(5, 4\)",
    "gradient of another dtype": r"the gradient of 1\.weight is torch\.float64",
}


@pytest.mark.parametrize("steps", [0, 1], ids=["first step", "later step"])
@pytest.mark.parametrize("make", FAMILY)
@pytest.mark.parametrize("what", MESSAGES)
def test_a_step_that_cannot_be_taken_changes_nothing(what: str, make: Any, steps: int) -> None:
    model, groups = named()
    optimizer = make(groups, lr=0.1)
    for _ in range(steps):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.randn(2, 3)).sum().backward()
    first, second = model.parameters()
    before, state = first.detach().clone(), _copied(optimizer)
    broken(what, second)
    with pytest.raises(ValueError, match=f"^{make.__name__}: {MESSAGES[what]}"):
        optimizer.step()
    assert torch.equal(first, before)
    assert _copied(optimizer) == state


def _copied(optimizer: torch.optim.Optimizer) -> list[list[float]]:
    """All numbers of the state, without naming what it is made of; state of zeros counts as none."""
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return [tensor.flatten().tolist() for tensor in tensors if tensor.any()]


@pytest.mark.gpu
def test_a_parameter_that_went_to_the_gpu_is_named() -> None:
    model, groups = named()
    optimizer = AdamW(groups)
    model.cuda()
    model(torch.randn(2, 3, device="cuda")).sum().backward()
    with pytest.raises(ValueError, match=r"AdamW: 0\.weight was changed .* on cpu and is .* on cuda:0; move or cast"):
        optimizer.step()


def test_without_names_the_place_is_told() -> None:
    params = parameters("cpu", shapes=SHAPES)
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}])
    params[1].grad = torch.ones(5).to_sparse()
    with pytest.raises(ValueError, match=r"the gradient of parameter 0 of group 1 \(shape \(5,\)\) is sparse"):
        optimizer.step()


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "negative rate": ({"lr": -1}, r"lr is -1; it must be 0 or more"),
    "rate of no number": ({"lr": float("nan")}, r"lr is nan; it must be 0 or more"),
    "negative rate in a tensor": ({"lr": torch.tensor(-0.5)}, r"lr is -0\.5; it must be 0 or more"),
    "rate of two numbers": ({"lr": torch.ones(2)}, r"lr is a torch\.float32 tensor of shape \(2,\)"),
    "beta": ({"betas": (0.9, 1.0)}, r"betas are \(0\.9, 1\.0\); both must be"),
    "eps": ({"eps": -1e-8}, r"eps is -1e-08"),
    "decay": ({"weight_decay": float("inf")}, r"weight_decay is inf"),
    "amsgrad": ({"amsgrad": True}, r"amsgrad is True; .* use torch\.optim\.AdamW\(amsgrad=True\)"),
    "differentiable": ({"differentiable": True}, r"differentiable is True"),
    "norm": ({"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0; it must be above 0, or None"),
}


@pytest.mark.parametrize("make", FAMILY)
@pytest.mark.parametrize("case", OPTIONS)
def test_options_out_of_range_are_refused_at_once(case: str, make: Any) -> None:
    options, message = OPTIONS[case]
    with pytest.raises(ValueError, match=f"^{make.__name__}: {message}"):
        make([nn.Parameter(torch.ones(3))], **options)


def test_options_of_a_group_are_refused_by_its_number() -> None:
    params = parameters("cpu", shapes=SHAPES)
    with pytest.raises(ValueError, match=r"AdamW: lr in parameter group 1 is -2"):
        AdamW([{"params": params[:1]}, {"params": params[1:], "lr": -2}])
    optimizer = AdamW(params[:1])
    with pytest.raises(ValueError, match=r"AdamW: eps in parameter group 1 is -1"):
        optimizer.add_param_group({"params": params[1:], "eps": -1})
    assert len(optimizer.param_groups) == 1


def test_a_rate_that_a_scheduler_made_negative_updates_nothing() -> None:
    params = parameters("cpu", shapes=SHAPES)
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}])
    gradients(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1]["lr"] = -1e-3
    with pytest.raises(ValueError, match=r"AdamW: lr in parameter group 1 is -0\.001"):
        optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.ones(3, dtype=torch.float64), r"\(shape \(3,\)\) is torch\.float64; it must be float32, float16"),
        (torch.ones(3, 2).t(), r"\(shape \(2, 3\)\) is not contiguous \(strides \(1, 2\)\)"),
        (torch.eye(3).to_sparse(), r"\(shape \(3, 3\)\) is sparse"),
    ],
    ids=["float64", "strides", "sparse"],
)
def test_parameters_that_no_kernel_takes(param: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^AdamW: parameter 1 of group 0 {message}"):
        AdamW([nn.Parameter(torch.ones(2)), nn.Parameter(param)])


@pytest.mark.parametrize("option", ["device_budget_bytes", "reserve_bytes"])
def test_amounts_of_memory(option: str) -> None:
    with pytest.raises(ValueError, match=rf"PagedAdamW: {option} is -1; it must be a number of bytes, 0 or more"):
        PagedAdamW([nn.Parameter(torch.ones(3))], **{option: -1})


CHANGES: dict[str, tuple[Callable[[dict[str, Any], Params], None], str]] = {
    "another shape": (
        lambda saved, params: saved["state"][1].update(exp_avg=torch.zeros(6)),
        r"AdamW: parameter 1 of group 0 .*: exp_avg of the state dict has shape \(6,\); it must be \(5,\)",
    ),
    "as many elements": (
        lambda saved, params: saved["state"][0].update(exp_avg_sq=torch.zeros(3, 4)),
        r"AdamW: parameter 0 of group 0 .*: exp_avg_sq of the state dict has shape \(3, 4\); it must be \(4, 3\)",
    ),
    "a key missing": (
        lambda saved, params: saved["state"][1].pop("exp_avg_sq"),
        r"AdamW: parameter 1 of group 0 .*: the state dict lacks exp_avg_sq of it; it has step, exp_avg",
    ),
    "the step missing": (
        lambda saved, params: saved["state"][1].pop("step"),
        r"AdamW: parameter 1 of group 0 .*: the state dict lacks step",
    ),
    "integers": (
        lambda saved, params: saved["state"][1].update(exp_avg=torch.zeros(5, dtype=torch.int64)),
        r"AdamW: parameter 1 of group 0 .*: exp_avg of the state dict is torch\.int64",
    ),
    "half a step": (
        lambda saved, params: saved["state"][1].update(step=1.5),
        r"AdamW: parameter 1 of group 0 .*: step of the state dict is 1\.5; it must be a whole number",
    ),
    "maxima": (
        lambda saved, params: saved["state"][1].update(max_exp_avg_sq=torch.zeros(5)),
        r"AdamW: parameter 1 of group 0 .* max_exp_avg_sq \(amsgrad\)",
    ),
    "more groups": (
        lambda saved, params: saved["param_groups"].append(saved["param_groups"][0]),
        r"AdamW: the state dict has 2 parameter groups and the optimizer 1",
    ),
    "fewer parameters": (
        lambda saved, params: saved["param_groups"][0].update(params=[0]),
        r"AdamW: group 0 of the state dict has 1 parameters and that of the optimizer 2",
    ),
    "a negative rate": (
        lambda saved, params: saved["param_groups"][0].update(lr=-1.0),
        r"AdamW: the state dict: lr in parameter group 0 is -1\.0",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_state_dict_that_does_not_fit_changes_nothing(case: str) -> None:
    change, message = CHANGES[case]
    params = parameters("cpu", shapes=SHAPES)
    optimizer = AdamW(params, lr=1e-2)
    gradients(params, 0)
    optimizer.step()
    before = optimizer.state_dict()
    expected = {key: entry["exp_avg"].clone() for key, entry in before["state"].items()}
    changed = AdamW(params, lr=5e-2).state_dict() | {
        "state": {key: {**entry, "exp_avg": entry["exp_avg"] + 1} for key, entry in before["state"].items()}
    }
    change(changed, params)
    with pytest.raises(ValueError, match=f"^{message}"):
        optimizer.load_state_dict(changed)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][key]["exp_avg"], was) for key, was in expected.items())
