"""A step that runs out of memory runs again with the optimizer's state out of the way, to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers.tiny import assert_equal_weights, losses_of, tiny_lora, weights_of

from fastpeft.errors import UserError
from fastpeft.optim import PagedAdamW
from fastpeft.trainers import SFTTrainer

MakeTrainer = Callable[..., SFTTrainer]
TOLD = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB. See documentation"


class _Fails(torch.autograd.Function):
    """Raises in forward or backward at chosen calls, as torch's allocator does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fails: Fails) -> Tensor:
        ctx.fails = fails
        fails.count("forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        ctx.fails.count("backward")
        return dy, None


class Fails(nn.Module):
    """In the middle of the model: gradients of what lies behind it are there already when its backward fails."""

    def __init__(self, layer: nn.Module, where: str, calls: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.where, self.calls, self.called = layer, where, calls, 0

    def count(self, where: str) -> None:
        if where == self.where:
            self.called += 1
            if self.called in self.calls:
                raise torch.OutOfMemoryError(TOLD)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(_Fails.apply(x, self), *args, **kwargs)


def trained(
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
    where: str = "forward",
    calls: tuple[int, ...] = (),
    optimizer: str = "paged_adamw",
    **options: Any,
) -> tuple[SFTTrainer, list[int]]:
    """A run of six steps of two micro-batches with dropout, in which calls of the second layer fail."""
    evicted: list[int] = []

    def evict(self: PagedAdamW, nbytes: int | None = None) -> int:
        evicted.append(1)
        return 3_000_000_000

    monkeypatch.setattr(PagedAdamW, "evict", evict)
    model: Any = tiny_lora(dropout=0.3)
    layers = model.get_base_model().model.layers
    layers[1].mlp = Fails(layers[1].mlp, where, calls)
    options = {"gradient_accumulation_steps": 2, "max_steps": 6, "optimizer": optimizer, **options}
    trainer = make_trainer(model, folder=f"{where}-{len(calls)}", **options)
    trainer.train()
    return trainer, evicted


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("call", [1, 2, 7, 8], ids=["first of all", "second micro-batch", "step 4", "step 4, second"])
def test_the_step_runs_again(
    where: str, call: int, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Gradients that were added up before, or half added, are made again; so are the draws of dropout and the sums."""
    expected, none = trained(make_trainer, monkeypatch)
    trainer, evicted = trained(make_trainer, monkeypatch, where, (call,))
    assert not none and evicted == [1]
    assert_equal_weights(weights_of(expected.model), weights_of(trainer.model))
    assert losses_of(trainer) == losses_of(expected)
    for key in ("mean_token_accuracy", "num_tokens"):
        assert [line[key] for line in trainer.state.log_history if key in line] == [
            line[key] for line in expected.state.log_history if key in line
        ]
    assert "3 GB of the optimizer's state moved to host memory, and the step starts over" in caplog.text
    assert "Tried to allocate 2.00 GiB" in caplog.text


def test_one_retry_a_failure(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, evicted = trained(make_trainer, monkeypatch, calls=(2, 9))
    assert evicted == [1, 1] and trainer.state.global_step == 6


def test_when_that_does_not_help_the_run_ends_with_advice(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = r"the GPU's memory ran out \(.*2\.00 GiB\), also with all .* in host memory; lower per_device_train_batch"
    with pytest.raises(UserError, match=told):
        trained(make_trainer, monkeypatch, calls=(3, 4))


def test_without_pages_the_advice_is_to_have_some(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"memory ran out .*; .*, or set optimizer: paged_adamw_8bit"):
        trained(make_trainer, monkeypatch, calls=(3,), optimizer="adamw")


@pytest.mark.gpu
def test_a_real_one(make_trainer: MakeTrainer) -> None:
    """In the third step somebody takes what memory is left; moving the optimizer's state makes room for the step."""
    model = nn.Module.cuda(tiny_lora(dropout=0.0))  # the state is small: a big parameter beside it makes some
    extra = nn.Parameter(torch.zeros(1 << 25, device="cuda"))
    model.register_parameter("extra", extra)
    trainer = make_trainer(model, use_cpu=False, optimizer="paged_adamw", max_steps=4)
    step, hogs = trainer.compute_loss, []

    def compute_loss(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = step(model, *args, **kwargs) + 0.0 * extra.sum()
        if trainer.state.global_step == 2:
            optimizer = trainer.optimizer.optimizer
            if not hogs:
                hogs.append(optimizer.memory()["device"])
            if optimizer.memory()["device"] > 1 << 20:
                raise torch.OutOfMemoryError(TOLD)
        return loss

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    trainer.train()
    assert hogs[0] > 200 << 20
    assert trainer.state.global_step == 4
