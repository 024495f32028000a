"""Which optimizer a run gets, by `optimizer` and by the names that transformers has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.tiny import assert_equal_weights, weights_of

from fastpeft.errors import UserError
from fastpeft.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit
from fastpeft.trainers import SFTConfig, SFTTrainer

MakeTrainer = Callable[..., SFTTrainer]
OURS = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "paged_adamw": PagedAdamW,
    "paged_adamw_8bit": PagedAdamW8bit,
}
NAMES: dict[str, tuple[dict[str, Any], type]] = {
    "neither": ({}, AdamW),
    **{f"optimizer {name}": ({"optimizer": name}, kind) for name, kind in OURS.items()},
    "optim adamw_8bit": ({"optim": "adamw_8bit"}, AdamW8bit),
    "optim adamw_bnb_8bit": ({"optim": "adamw_bnb_8bit"}, AdamW8bit),
    "optim paged_adamw": ({"optim": "paged_adamw"}, PagedAdamW),
    "optim paged_adamw_32bit": ({"optim": "paged_adamw_32bit"}, PagedAdamW),
    "optim paged_adamw_8bit": ({"optim": "paged_adamw_8bit"}, PagedAdamW8bit),
    "optim adamw_torch": ({"optim": "adamw_torch"}, torch.optim.AdamW),
    "optim adamw_torch_fused": ({"optim": "adamw_torch_fused"}, torch.optim.AdamW),
    "optim sgd": ({"optim": "sgd"}, torch.optim.SGD),
    "optimizer torch": ({"optimizer": "torch"}, torch.optim.AdamW),
    "optimizer torch, optim adagrad": ({"optimizer": "torch", "optim": "adagrad"}, torch.optim.Adagrad),
    "both, alike": ({"optimizer": "paged_adamw_8bit", "optim": "paged_adamw_8bit"}, PagedAdamW8bit),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(case: str, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of bitsandbytes mean our own, and bitsandbytes is not asked for."""
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    options, expected = NAMES[case]
    trainer = make_trainer(adam_beta2=0.99, adam_epsilon=1e-7, **options)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is expected
    if expected in OURS.values():
        assert optimizer.defaults["betas"] == (0.9, 0.99) and optimizer.defaults["eps"] == 1e-7
    # a config that is copied means the same
    copied = dataclasses.replace(trainer.args)
    assert (copied.optimizer, copied.optim) == (trainer.args.optimizer, trainer.args.optim)


def test_bitsandbytes_own_is_to_be_had_by_name(make_trainer: MakeTrainer) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    trainer = make_trainer(optimizer="torch", optim="adamw_bnb_8bit")
    assert isinstance(trainer.create_optimizer(), bitsandbytes.optim.AdamW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "optimizer is 'adam'; it must be one of adamw, adamw_8bit, .*; did you mean 'adamw'"),
        ({"optim": "paged_adamw_8bits"}, "optim is 'paged_adamw_8bits'; it must be one of .* mean 'paged_adamw_8bit'"),
        (
            {"optimizer": "adamw_8bit", "optim": "paged_adamw_8bit"},
            "optim is 'paged_adamw_8bit'; and optimizer is 'adamw_8bit', which is another one; give one of the two",
        ),
        ({"optim_device_budget_gb": 2}, "optim_device_budget_gb is 2; it is for paged optimizers, .* is 'adamw'"),
        ({"optimizer": "paged_adamw", "optim_device_budget_gb": -1}, "optim_device_budget_gb is -1; it must be 0 or"),
    ],
    ids=["optimizer", "optim", "both", "budget without pages", "negative budget"],
)
def test_names_and_budgets_that_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^SFTConfig: {message}"):
        SFTConfig(str(tmp_path), report_to="none", use_cpu=True, **options)


def test_the_budget_reaches_the_optimizer(make_trainer: MakeTrainer) -> None:
    optimizer = make_trainer(optimizer="paged_adamw_8bit", optim_device_budget_gb=1.5).create_optimizer()
    assert isinstance(optimizer, PagedAdamW8bit) and optimizer.device_budget_bytes == 1_500_000_000


def test_messages_name_the_models_parameters(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("lora")
    optimizer = trainer.create_optimizer()
    named = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [named[id(p)] for p in group["params"]]


@pytest.mark.parametrize("optimizer", OURS)
def test_a_resumed_run_equals_an_unbroken_one(optimizer: str, make_trainer: MakeTrainer) -> None:
    options = {"optimizer": optimizer, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = make_trainer(folder="whole", max_steps=6, **options)
    whole.train()
    make_trainer(folder="broken", max_steps=3, **options).train()
    resumed = make_trainer(folder="broken", max_steps=6, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))
