"""Options that cannot work are refused when the config is made, not where the trainer first uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.errors import UserError
from fastpeft.trainers import SFTConfig

NAN, INFINITY = float("nan"), float("inf")
WRONG: dict[str, tuple[Any, ...]] = {
    "adam_beta1": (2, 1, -0.1, NAN),
    "adam_beta2": (1.0, NAN),
    "adam_epsilon": (-1e-8, INFINITY),
    "data_seed": (-1,),
    "dataloader_num_workers": (-1,),
    "eval_steps": (0, -1, INFINITY),
    "gradient_accumulation_steps": (0, -1, 1.5),
    "learning_rate": (-1, NAN, INFINITY, "2e-4"),
    "logging_steps": (0, -1, NAN),
    "max_grad_norm": (-1.0, NAN),
    "max_steps": (0, -2, 1.5),
    "neftune_noise_alpha": (-1, NAN),
    "num_train_epochs": (0, -1, NAN, INFINITY),
    "per_device_eval_batch_size": (0, -2),
    "per_device_train_batch_size": (0, -2),
    "save_steps": (0, -1),
    "save_total_limit": (0, -1),
    "seed": (-1, 2**32),
    "warmup_steps": (-1, NAN),
    "weight_decay": (-0.1, NAN),
}


def config(tmp_path: Path, **options: Any) -> SFTConfig:
    return SFTConfig(str(tmp_path), **{"report_to": "none", "use_cpu": True, **options})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_number_out_of_range_is_refused_at_once(name: str, value: Any, tmp_path: Path) -> None:
    """Each of these ended in a traceback from below the trainer, after the model was loaded, or trained to NaN."""
    with pytest.raises(UserError) as caught:
        config(tmp_path, **{name: value})
    assert str(caught.value).startswith(f"SFTConfig: {name} is {value!r}; it must be ")


def test_numbers_at_the_edge_are_taken(tmp_path: Path) -> None:
    edge = {"learning_rate": 0, "adam_beta1": 0, "adam_epsilon": 0, "weight_decay": 0, "max_grad_norm": 0, "seed": 0}
    config(tmp_path, **edge, save_total_limit=None, warmup_steps=0, logging_steps=0.5, max_steps=-1)
    assert config(tmp_path, max_steps=1, num_train_epochs=0).max_steps == 1, "the epochs do not count then"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, r"lr_scheduler_type is 'cosin'; it must be one of linear, .* mean 'cosine'\?"),
        ({"lr_scheduler_kwargs": {"x": 1}}, "the schedule 'cosine' cannot be made with it: .*argument 'x'"),
        ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_kwargs is {'num_cycles': 'x'}; the schedule"),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 1}},
            "lr_scheduler_kwargs is .*; the schedule 'constant' takes none",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type is 'warmup_stable_decay'; it needs fitting lr_scheduler_kwargs: .*'num_decay_steps'",
        ),
        ({"report_to": "tensorbord"}, r"report_to is \['tensorbord'\]; it takes none, all, or .* mean 'tensorboard'\?"),
        ({"fp16": True}, "fp16 is True; it needs a GPU"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_choice_that_cannot_work_is_refused_at_once(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^SFTConfig: .*{message}"):
        config(tmp_path, **options)


def test_a_logger_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(
        UserError, match=r"report_to is \['tensorboard', 'wandb'\]; the Python package for wandb is not"
    ):
        config(tmp_path, report_to=["tensorboard", "wandb"])
    assert config(tmp_path, report_to="all").report_to == ["tensorboard"]


def test_schedules_are_made_with_what_they_take(tmp_path: Path) -> None:
    for kind, kwargs in {
        "cosine_with_min_lr": {"min_lr": 1e-6},
        "warmup_stable_decay": {"num_decay_steps": 10},
        "polynomial": {"power": 2.0},
        "constant": None,
        "cosine": '{"num_cycles": 2}',
    }.items():
        assert config(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs).lr_scheduler_type == kind


@pytest.mark.gpu
def test_fp16_is_taken_where_there_is_a_gpu(tmp_path: Path) -> None:
    assert torch.cuda.is_available()
    assert config(tmp_path, use_cpu=False, fp16=True).fp16
