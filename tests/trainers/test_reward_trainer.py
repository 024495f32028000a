"""RewardTrainer: the score it learns, on which layouts and models, and what it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.preferences import PAIRS, RANKINGS, lora, options
from trainers.tiny import assert_equal_weights, losses_of, tiny_llama, weights_of
from transformers import LlamaForSequenceClassification

from fastpeft.errors import UserError
from fastpeft.methods import PeftModel, get_peft_model
from fastpeft.models import quantize
from fastpeft.trainers import RewardConfig, RewardTrainer, attach_score, get_reward_model
from fastpeft.trainers.losses import reward_loss
from fastpeft.trainers.metrics import Meter


def make(folder: Path, tokenizer: Any, model: Any = None, rows: Any = PAIRS, peft: Any = None, **changes: Any) -> Any:
    args = RewardConfig(**options(folder, max_length=64, **changes))
    return RewardTrainer(model or tiny_llama(), args, rows, rows, tokenizer, peft_config=peft)


def by_hand(trainer: RewardTrainer, rows: Any) -> torch.Tensor:
    """Scores of the pairs' answers, one sequence at a time."""
    base = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    dataset = trainer.prepare_dataset(rows, "rows")
    scores = []
    for item in dataset:
        for completion in item["completions"]:
            ids = torch.tensor([[*item["prompt_ids"], *completion]])
            hidden = base.model(ids, use_cache=False).last_hidden_state
            scores.append(base.score(hidden[0, -1]))
    return torch.cat(scores)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("kind", ["full", "lora", "lora-nf4"])
def test_the_score_is_that_of_the_last_token(layout: str, kind: str, tmp_path: Path, tokenizer: Any) -> None:
    model = quantize(tiny_llama()) if kind == "lora-nf4" else tiny_llama()
    trainer = make(tmp_path, tokenizer, model, RANKINGS, None if kind == "full" else lora(), layout=layout)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        scores = trainer.scores(trainer.model.eval(), batch)
        torch.testing.assert_close(scores, by_hand(trainer, RANKINGS[:3]), rtol=1e-4, atol=1e-5)
        losses = trainer.pair_losses(trainer.model, batch, Meter(torch.device("cpu")))
    chosen, rejected = scores[batch["pairs"]].unbind(1)
    assert len(losses) == 9, "three pairs of each ranking of three"
    torch.testing.assert_close(losses, reward_loss(chosen, rejected))


def test_it_learns_the_order(tmp_path: Path, tokenizer: Any) -> None:
    trainer = make(tmp_path, tokenizer, rows=RANKINGS, peft=lora(), max_steps=25, learning_rate=1e-2)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] > 0.9 > before["eval_accuracy"]
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_min_reward"] < after["eval_mean_reward"] < after["eval_max_reward"]
    shares = [after.get(f"eval_calibration/{low}") for low in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert any(share is not None for share in shares) and 0 <= after["eval_calibration_error"] <= 0.5
    assert not [name for name in after if "__" in name], "what the calibration is made of is not reported"


def test_accumulation_and_layout_do_not_change_the_step(tmp_path: Path, tokenizer: Any) -> None:
    found = []
    for name, changes in (
        ("whole", {"layout": "padded"}),
        ("shared", {"layout": "shared"}),
        ("split", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "layout": "packed"}),
    ):
        trainer = make(tmp_path / name, tokenizer, rows=RANKINGS, train_sampling_strategy="sequential", **changes)
        trainer.train()
        found.append(losses_of(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_margin_and_centering_reach_the_loss(tmp_path: Path, tokenizer: Any) -> None:
    plain, changed = (
        make(
            tmp_path / str(weight),
            tokenizer,
            rows=[{**row, "margin": 2.0} for row in PAIRS] if weight else PAIRS,
            center_rewards_coefficient=weight,
        )
        for weight in (None, 0.5)
    )
    plain.train()
    changed.train()
    assert losses_of(changed)[0] > losses_of(plain)[0] + 1.0, "a margin of 2 costs more than 1 nat at the start"


def test_saved_and_loaded(tmp_path: Path, tokenizer: Any) -> None:
    """The adapter's folder has its score; another model with it scores alike, and so does stock PEFT."""
    trainer = make(tmp_path, tokenizer, peft=lora())
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(attach_score(tiny_llama(), seed=5), tmp_path / "adapter")
    ids = torch.tensor([[1, 4, 5, 6]])
    hidden = torch.randn(1, 64)
    with torch.no_grad():
        assert torch.equal(loaded.score(hidden), trainer.model.score(hidden))
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)

    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(
        LlamaForSequenceClassification.config_class(**{**tiny_llama().config.to_dict(), "num_labels": 1})
    )
    base.model.load_state_dict(tiny_llama().model.state_dict())
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    mine = trainer.scores(
        trainer.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "ends": torch.tensor([3])}
    )
    torch.testing.assert_close(theirs(ids).logits[:, 0], mine, rtol=1e-4, atol=1e-5)


def test_resume_is_exact(tmp_path: Path, tokenizer: Any) -> None:
    whole = make(tmp_path / "whole", tokenizer, peft=lora(), disable_dropout=False)
    whole.train()
    half = make(
        tmp_path / "half",
        tokenizer,
        peft=lora(),
        disable_dropout=False,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    half.train()
    resumed = make(tmp_path / "half", tokenizer, peft=lora(), disable_dropout=False)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))


def test_a_model_for_sequence_classification(tmp_path: Path, tokenizer: Any) -> None:
    config = {**tiny_llama().config.to_dict(), "num_labels": 1}
    model = LlamaForSequenceClassification(LlamaForSequenceClassification.config_class(**config))
    trainer = make(tmp_path, tokenizer, model)
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    wide = LlamaForSequenceClassification(LlamaForSequenceClassification.config_class(**{**config, "num_labels": 3}))
    with pytest.raises(UserError, match="3 outputs"):
        make(tmp_path, tokenizer, wide)


def test_an_adapter_without_a_score_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no score layer to train"):
        make(tmp_path, tokenizer, get_peft_model(tiny_llama(), lora()))
    with pytest.raises(UserError, match="give one of them"):
        make(tmp_path, tokenizer, get_reward_model(tiny_llama(), lora()), peft=lora())
