"""Training in orders that are computed: a run that is resumed meets the rows that it would have met."""

from __future__ import annotations

import pytest
from trainers.tiny import assert_equal_weights, losses_of, weights_of

from fastpeft.data import MixedDataset, build_sft_dataset
from fastpeft.trainers import base


@pytest.mark.parametrize("order", ["computed", "grouped", "mixed"])
def test_resume_in_the_middle_of_a_later_epoch_is_exact(make_trainer, monkeypatch, tokenizer, rows, order):
    """22 rows in batches of 4: step 8 is the second of the second epoch."""
    options = {"max_steps": 11}
    if order == "computed":
        monkeypatch.setattr(base, "_MANY_ROWS", 10)
    elif order == "grouped":
        options["train_sampling_strategy"] = "group_by_length"
    else:
        parts = [build_sft_dataset(part, tokenizer, max_length=64) for part in (rows[:10], rows[10:])]
        options["train_dataset"] = MixedDataset(parts, [1.5, 0.5])
    straight = make_trainer("lora", folder="straight", **options)
    straight.train()
    stopped = make_trainer("lora", folder="stopped", **options, save_strategy="steps", save_steps=8)
    stopped.train()
    assert_equal_weights(weights_of(straight.model), weights_of(stopped.model))
    resumed = make_trainer("lora", folder="stopped", **options)
    resumed.train(resume_from_checkpoint=f"{stopped.args.output_dir}/checkpoint-8")
    assert_equal_weights(weights_of(straight.model), weights_of(resumed.model))


def test_epochs_differ(make_trainer, monkeypatch):
    monkeypatch.setattr(base, "_MANY_ROWS", 10)
    trainer = make_trainer(max_steps=12, learning_rate=0.0)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[:6] != losses[6:]
