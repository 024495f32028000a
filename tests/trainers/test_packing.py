"""Training on packed rows is training on the rows: equal losses and gradients, and no row sees another."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from trainers.tiny import assert_equal_weights, losses_of, tiny_llama, tiny_lora, weights_of

from fastpeft.errors import UserError
from fastpeft.methods import PromptTuningConfig, get_peft_model
from fastpeft.models import accelerate


def loss_and_gradients(trainer):
    """Of one step over all rows."""
    model = trainer.model.train()
    items = list(trainer.train_dataset)
    loss = trainer.compute_loss(model, trainer.data_collator(items))
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["plain", "accelerated", "lora"])
def test_losses_and_gradients_are_those_of_the_rows_by_themselves(make_trainer, attention, kind):
    found = []
    for packing in (False, True):
        model: nn.Module = tiny_lora(dropout=0.0) if kind == "lora" else tiny_llama()
        base = model.get_base_model() if kind == "lora" else model
        base.set_attn_implementation(attention)
        if kind == "accelerated":
            accelerate(model)
        found.append(loss_and_gradients(make_trainer(model, packing=packing)))
    (loss, gradients), (packed_loss, packed_gradients) = found
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_weighs_targets_whatever_sequence_they_are_in(make_trainer):
    """One sequence a micro-batch, of unequal numbers of targets: the step's loss is still the mean over targets."""
    whole, parts = (
        make_trainer(packing=True, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                     train_sampling_strategy="sequential", folder=f"run{size}")
        for size, steps in ((4, 1), (1, 4))
    )  # fmt: skip
    for trainer in (whole, parts):
        trainer.train()
    assert losses_of(whole) == pytest.approx(losses_of(parts), rel=1e-5)


def test_the_log_counts_tokens_without_padding(make_trainer, tokenizer, rows):
    trainer = make_trainer(packing=True, max_steps=-1, num_train_epochs=1)
    assert len(trainer.train_dataset) < len(rows)
    trainer.train()
    assert trainer.state.log_history[-2]["num_tokens"] == sum(trainer.train_dataset.lengths)


def test_evaluation_goes_row_by_row_and_does_not_change(make_trainer, rows):
    one, other = (make_trainer(packing=packing, eval_dataset=rows).evaluate()["eval_loss"] for packing in (False, True))
    assert one == other


def test_resume_in_the_middle_of_an_epoch_is_exact(make_trainer):
    options = {"packing": True, "max_length": 32, "per_device_train_batch_size": 2, "max_steps": 6}
    straight = make_trainer("lora", folder="straight", **options)
    straight.train()
    stopped = make_trainer("lora", folder="stopped", **options, save_strategy="steps", save_steps=3)
    stopped.train()
    resumed = make_trainer("lora", folder="stopped", **options)
    resumed.train(resume_from_checkpoint=str(stopped.args.output_dir) + "/checkpoint-3")
    assert_equal_weights(weights_of(straight.model), weights_of(resumed.model))


class _Convolves(nn.Module):
    """Mixes each token with the one before it, as the layers of state-space models do, past the border of a row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return self.inner(x + x.roll(1, dims=1))


def test_a_model_whose_rows_would_see_each_other_is_refused(make_trainer):
    model = tiny_llama()
    model.model.layers[0].mlp = _Convolves(model.model.layers[0].mlp)
    make_trainer(model)
    with pytest.raises(UserError, match="with packing, the rows of a sequence see each other"):
        make_trainer(model, packing=True)


def test_virtual_tokens_are_refused(make_trainer):
    model = get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=4))
    with pytest.raises(UserError, match="the adapter's 4 virtual tokens begin only the first"):
        make_trainer(model, packing=True)
