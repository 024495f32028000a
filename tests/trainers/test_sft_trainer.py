"""SFTTrainer: the loss it minimises, the models it trains, the steps it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from trainers.tiny import assert_equal_weights, losses_of, tiny_llama, tiny_lora, weights_of
from transformers import Trainer, TrainerCallback, TrainingArguments

from fastpeft.data import SFTCollator, build_sft_dataset
from fastpeft.errors import FastpeftError, UserError
from fastpeft.trainers import SFTConfig, SFTTrainer
from fastpeft.trainers.losses import token_nll

MakeTrainer = Callable[..., SFTTrainer]


@pytest.fixture
def batch(tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    dataset = build_sft_dataset(rows, tokenizer, max_length=64)
    return SFTCollator(tokenizer.pad_token_id)([dataset[i] for i in (1, 2, 3, 4)])


def masked_mean(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss as a sum over rows and tokens, written out."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    terms = [
        F.log_softmax(logits[row, t], dim=-1)[label]
        for row, labels in enumerate(batch["labels"])
        for t, label in enumerate(labels[1:])
        if label != -100
    ]
    return -torch.stack(terms).mean()


# The loss.


@pytest.mark.parametrize("model", ["full", "lora", "lora-nf4"])
def test_loss_is_the_mean_over_target_tokens(model: str, make_trainer: MakeTrainer, batch: dict[str, Any]) -> None:
    trainer = make_trainer(model)
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        expected = masked_mean(trainer.model, batch)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_output_layer_runs_at_loss_positions_only(make_trainer: MakeTrainer, batch: dict[str, Any]) -> None:
    trainer = make_trainer("lora")
    seen: list[int] = []
    trainer.model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    assert seen == [len(batch["loss_positions"])]
    assert len(batch["loss_positions"]) < batch["labels"].shape[1]

    trainer._selects_logits = False  # a model whose forward has no logits_to_keep
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), loss)
    without = {key: value for key, value in batch.items() if key != "loss_positions"}
    torch.testing.assert_close(trainer.compute_loss(trainer.model, without), loss)
    assert seen[1:] == [batch["labels"].shape[1]] * 2


def test_prompt_and_padding_are_not_learnt(make_trainer: MakeTrainer, batch: dict[str, Any]) -> None:
    """The gradient of the logits is zero except where the next token is a target, EOS included."""
    logits = torch.randn(*batch["labels"].shape, 200, requires_grad=True)
    nll, count, _ = token_nll(logits[:, :-1], batch["labels"][:, 1:])
    nll.backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(-1) > 0
    is_target = F.pad(batch["labels"][:, 1:] != -100, (0, 1))
    assert torch.equal(touched, is_target)
    assert int(count) == int(is_target.sum())
    last = batch["attention_mask"].sum(1) - 1
    assert (batch["labels"][torch.arange(4), last] == 2).all(), "EOS ends each row and is a target"


def test_token_nll_counts_hits() -> None:
    logits = torch.tensor([[[0.0, 5.0], [5.0, 0.0], [5.0, 0.0]]])
    nll, count, correct = token_nll(logits, torch.tensor([[1, 1, -100]]))
    assert (int(count), int(correct)) == (2, 1)
    assert math.isclose(float(nll), 2 * math.log1p(math.exp(-5)) + 5, rel_tol=1e-6)


@pytest.mark.parametrize("model", ["full", "lora-nf4"])
def test_accumulation_does_not_change_the_step(model: str, make_trainer: MakeTrainer) -> None:
    """4 rows at once and 4 times one row, of uneven lengths, are the same step."""
    options = {"max_steps": 3, "train_sampling_strategy": "sequential", "max_grad_norm": 1e9}
    if model == "lora-nf4":
        model_of: Callable[[], nn.Module] = lambda: tiny_lora(quantized=True, dropout=0.0)  # noqa: E731
    else:
        model_of = tiny_llama
    whole = make_trainer(model_of(), per_device_train_batch_size=4, gradient_accumulation_steps=1, **options)
    split = make_trainer(model_of(), per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    whole.train()
    split.train()
    for one, other in zip(whole.state.log_history, split.state.log_history, strict=True):
        for key in ("loss", "grad_norm", "mean_token_accuracy", "num_tokens"):
            if key in one:
                assert math.isclose(one[key], other[key], rel_tol=1e-5), (one, other)


def test_gradient_checkpointing_gives_equal_gradients(make_trainer: MakeTrainer) -> None:
    """Also through dropout: the recomputed masks are the first ones."""
    options = {"max_steps": 3, "warmup_steps": 0}
    plain = make_trainer("lora-nf4", **options)
    recomputed = make_trainer("lora-nf4", gradient_checkpointing=True, **options)
    start = weights_of(plain.model)
    plain.train()
    recomputed.train()
    layers = [m for m in recomputed.model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert layers, "no layer recomputes its activations"
    assert_equal_weights(weights_of(plain.model), weights_of(recomputed.model))
    moved = sum(not torch.equal(start[name], p) for name, p in weights_of(plain.model).items())
    assert moved == len(start), "every adapter matrix was trained"


# Models and precision.


@pytest.mark.parametrize("optimizer", ["adamw", "torch"])
@pytest.mark.parametrize("model", ["full", "lora", "lora-nf4"])
def test_loss_falls(model: str, optimizer: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(model, max_steps=30, optimizer=optimizer, learning_rate=1e-2)
    trainer.train()
    losses = losses_of(trainer)
    factor = 0.6 if model == "full" else 0.93  # adapters cannot change the embedding, which is also the output layer
    assert sum(losses[-5:]) < factor * sum(losses[:5]), losses


def test_bfloat16_model_with_float32_adapters(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(tiny_lora(quantized=True, dtype=torch.bfloat16), max_steps=10, learning_rate=1e-2)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("model", ["full", "lora-nf4"])
def test_bf16_option_runs_a_float32_model_under_autocast(model: str, make_trainer: MakeTrainer) -> None:
    plain = make_trainer(model, max_steps=2)
    autocast = make_trainer(model, max_steps=2, bf16=True)
    plain.train()
    autocast.train()
    for one, other in zip(losses_of(plain), losses_of(autocast), strict=True):
        assert one != other and math.isclose(one, other, rel_tol=0.02)


def test_decay_spares_biases_and_norms(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("full", weight_decay=0.5)
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0.0) == ("norm" in names[id(parameter)])


def test_schedule_warms_up_and_decays(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=20, warmup_steps=4, learning_rate=1.0, lr_scheduler_type="cosine")
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 0.02


@pytest.mark.parametrize(
    ("steps", "warmup", "rates"),
    [(1, 0.03, [1.0]), (2, 0.03, [0.0, 1.0]), (3, 0.9, [0.0, 0.5, 1.0]), (2, 2, [0.0, 0.5])],
)
def test_a_fraction_of_warm_up_leaves_a_step_to_train(
    steps: int, warmup: float, rates: list[float], make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """With max_steps=1 the default 3% of warm-up was the whole run, whose learning rate was 0 without a word."""
    trainer = make_trainer(max_steps=steps, warmup_steps=warmup, learning_rate=1.0)
    trainer.train()
    assert [line["learning_rate"] for line in trainer.state.log_history if "loss" in line] == rates
    assert trainer.args.warmup_steps == warmup
    assert "learning rate is 0" not in caplog.text


@pytest.mark.parametrize("options", [{"max_steps": 1, "warmup_steps": 1}, {"max_steps": 3, "learning_rate": 0.0}])
def test_a_run_that_trains_nothing_is_warned_of(
    options: dict[str, Any], make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(**options)
    trainer.train()
    assert {line["learning_rate"] for line in trainer.state.log_history if "loss" in line} == {0.0}
    assert f"the learning rate is 0 in every step of the run (steps: {options['max_steps']}, " in caplog.text


# Steps that must not be taken.


class Poison(TrainerCallback):
    """Make the gradients of chosen steps NaN, before clipping would see them."""

    def __init__(self, model: nn.Module, steps: set[int]) -> None:
        self.step = 0
        next(p for p in model.parameters() if p.requires_grad).register_hook(
            lambda grad: grad * math.nan if self.step in steps else grad
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


@pytest.mark.parametrize("optimizer", ["adamw", "torch"])
def test_nan_step_is_skipped(optimizer: str, make_trainer: MakeTrainer) -> None:
    """Neither weights nor moments see the step, so the run goes on as if its gradients had never been."""
    model = tiny_llama()
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            moments = {str(i): s["exp_avg"].clone() for i, s in enumerate(optimizer.state.values())}
            seen.append((weights_of(model), moments))

    trainer = make_trainer(model, callbacks=[Poison(model, {2}), Watch()], max_steps=5, optimizer=optimizer)
    trainer.train()
    for before, after in zip(seen[1], seen[2], strict=True):
        assert_equal_weights(before, after)
    assert not torch.equal(*(next(iter(seen[i][0].values())) for i in (2, 3))), "later steps train again"
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
    assert all(p.isfinite().all() for p in model.parameters())
    assert math.isnan(lines[2]["grad_norm"]) and math.isfinite(lines[3]["grad_norm"])


def test_nan_loss_is_reported_and_does_not_stick(make_trainer: MakeTrainer) -> None:
    """transformers' running loss stays NaN for good once a NaN was added to it."""

    class NanLoss(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 1 else loss

    base = make_trainer(max_steps=4)
    trainer = NanLoss(tiny_llama(), base.args, train_dataset=base.train_dataset, processing_class=base.processing_class)
    result = trainer.train()
    losses = losses_of(trainer)
    assert [math.isnan(loss) for loss in losses] == [False, True, False, False]
    assert math.isfinite(result.training_loss)


def test_infinite_loss_with_finite_gradients_is_skipped(make_trainer: MakeTrainer) -> None:
    class InfiniteLoss(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + math.inf

    base = make_trainer(max_steps=2)
    trainer = InfiniteLoss(
        tiny_llama(), base.args, train_dataset=base.train_dataset, processing_class=base.processing_class
    )
    before = weights_of(trainer.model)
    trainer.train()
    assert trainer.skipped_steps == 2
    assert_equal_weights(before, weights_of(trainer.model))


def test_nan_step_can_raise(make_trainer: MakeTrainer) -> None:
    model = tiny_llama()
    trainer = make_trainer(model, callbacks=[Poison(model, {0})], on_nonfinite="raise")
    before = weights_of(model)
    with pytest.raises(UserError, match=r"step 1: the loss is .* gradient norm nan.*lower learning_rate"):
        trainer.train()
    assert_equal_weights(before, weights_of(model))


def test_a_run_that_only_skips_is_given_up(make_trainer: MakeTrainer) -> None:
    model = tiny_llama()
    trainer = make_trainer(model, callbacks=[Poison(model, set(range(100)))], max_steps=100)
    with pytest.raises(UserError, match="the run learns nothing"):
        trainer.train()
    assert trainer.state.global_step == 19


# Evaluation.


def test_eval_loss_weighs_tokens_not_batches(make_trainer: MakeTrainer, rows: Any, tokenizer: Any) -> None:
    trainer = make_trainer(eval_dataset=rows, per_device_eval_batch_size=5)
    metrics = trainer.evaluate()
    everything = build_sft_dataset(rows, tokenizer, max_length=64)
    batch = SFTCollator(3)([everything[i] for i in range(len(everything))])
    with torch.no_grad():
        expected = masked_mean(trainer.model, batch)
    assert math.isclose(metrics["eval_loss"], float(expected), rel_tol=1e-5)
    assert 0 <= metrics["eval_mean_token_accuracy"] <= 1
    assert math.isclose(trainer.evaluate(rows[:3])["eval_loss"], trainer.evaluate(rows[:3])["eval_loss"])


def test_eval_runs_during_training_and_the_best_model_is_loaded(make_trainer: MakeTrainer, rows: Any) -> None:
    trainer = make_trainer(
        "lora",
        eval_dataset=rows[:6],
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        max_steps=8,
        learning_rate=0.5,  # soon makes the model worse
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    trainer.train()
    history = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    assert list(history) == [2, 4, 6, 8]
    best = min(history, key=lambda step: history[step])
    assert trainer.state.best_model_checkpoint == f"{trainer.args.output_dir}/checkpoint-{best}"
    assert math.isclose(trainer.evaluate()["eval_loss"], history[best], rel_tol=1e-6)


# Bad input.


class Tokenised(Dataset[dict[str, Any]]):
    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.items)


def test_tokenised_rows_train(make_trainer: MakeTrainer) -> None:
    items = [{"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}] * 8
    trainer = make_trainer(train_dataset=Tokenised(items))
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": []}, "train_dataset: it is empty"),
        ({"train_dataset": Tokenised([])}, "train_dataset is empty"),
        ({"train_dataset": Tokenised([{"text": "x"}])}, "have the keys text; they must have input_ids and labels"),
        ({"train_dataset": {"input": "x"}}, "train_dataset is a dict; give the path of a JSONL file"),
        ({"train_dataset": 7}, "train_dataset is a int; give the path"),
        ({"train_dataset": "no/such.jsonl"}, "no/such.jsonl"),
        ({"eval_dataset": 7}, "eval_dataset is a int"),
        ({"processing_class": None}, "the tokenizer is missing"),
        ({"eval_strategy": "steps"}, "eval_strategy is 'steps' and there is no eval_dataset"),
        ({"max_length": 7}, "max_length is 7; it must be 8"),
        ({"on_bad_row": "ignore"}, "on_bad_row is 'ignore'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be one of adamw, .*, torch"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'"),
        ({"push_to_hub": True}, "push_to_hub is not in this version"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not in this version"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_refused(options: dict[str, Any], message: str, make_trainer: MakeTrainer) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(**options)


def test_a_model_with_nothing_to_train_is_refused(make_trainer: MakeTrainer) -> None:
    from fastpeft.models import quantize

    with pytest.raises(UserError, match="quantised to NF4, so nothing in them can be trained; add an adapter"):
        make_trainer(quantize(tiny_llama()))
    with pytest.raises(UserError, match="no parameter of the model is trainable"):
        make_trainer(tiny_llama().requires_grad_(False))
    with pytest.raises(UserError, match="model is a str; it must be a loaded model"):
        SFTTrainer("llama", SFTConfig(report_to="none"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="args is a TrainingArguments; it must be the trainer's own config"):
        SFTTrainer(tiny_llama(), TrainingArguments(report_to="none"))


def test_a_transformers_without_our_hooks_is_refused(make_trainer: MakeTrainer, monkeypatch: Any) -> None:
    monkeypatch.delattr(Trainer, "_get_grad_norm")
    with pytest.raises(FastpeftError, match=r"has no Trainer._get_grad_norm.*install transformers>="):
        make_trainer()


def test_full_training_in_16_bits_is_warned_of(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tiny_llama(torch.bfloat16))
    assert "trainable parameters are held in 16 bits" in caplog.text


def test_padding_falls_back_to_eos(make_trainer: MakeTrainer, tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    trainer = make_trainer(processing_class=bare)
    assert trainer.data_collator.pad_token_id == bare.eos_token_id
    bare.eos_token = None
    with pytest.raises(UserError, match="neither a padding nor an EOS token"):
        make_trainer(processing_class=bare, train_dataset=trainer.train_dataset)
