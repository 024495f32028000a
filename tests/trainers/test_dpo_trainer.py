"""DPOTrainer: its losses from log-probabilities worked out one sequence at a time, its references, and their cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from trainers.preferences import PAIRS, RANKINGS, lora, loud_llama, options
from trainers.tiny import assert_equal_weights, losses_of, tiny_llama, weights_of

from fastpeft.data import build_preference_dataset
from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, get_peft_model
from fastpeft.models import accelerate, quantize
from fastpeft.trainers import DPOConfig, DPOTrainer
from fastpeft.trainers.heads import LogprobHead
from fastpeft.trainers.losses import dpo_loss
from fastpeft.trainers.metrics import Meter


def make(folder: Path, tokenizer: Any, model: Any = None, rows: Any = PAIRS, ref: Any = None, **changes: Any) -> Any:
    args = DPOConfig(**options(folder, max_length=64, **changes))
    return DPOTrainer(model or get_peft_model(tiny_llama(), lora()), ref, args, rows, rows, tokenizer)


def stirred(model: Any) -> Any:
    """The model with an adapter that does something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def sums(model: Any, item: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and tokens of each answer, from whole logits."""
    found = []
    for completion in item["completions"]:
        ids = torch.tensor([[*item["prompt_ids"], *completion]])
        logprobs = F.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), -1)
        begin = len(item["prompt_ids"])
        found.append(logprobs[range(begin - 1, ids.shape[1] - 1), ids[0, begin:]].sum())
    return torch.stack(found), torch.tensor([len(completion) for completion in item["completions"]])


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("kind", ["dense", "nf4", "accelerated", "head"])
def test_loss_by_hand(layout: str, kind: str, tmp_path: Path, tokenizer: Any) -> None:
    """``head``: the output layer has an adapter too, so it is no plain linear layer."""
    base = quantize(tiny_llama()) if kind == "nf4" else tiny_llama()
    if kind == "accelerated":
        accelerate(base)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"]) if kind == "head" else lora()
    model = stirred(get_peft_model(base, config)).eval()
    trainer = make(
        tmp_path,
        tokenizer,
        model,
        RANKINGS,
        layout=layout,
        loss_type=["ipo", "sigmoid", "sft"],
        loss_weights=[0.5, 1.0, 0.1],
    )
    items = [trainer.train_dataset[i] for i in range(2)]
    with torch.no_grad():
        losses = trainer.pair_losses(model, trainer.data_collator(items), Meter(torch.device("cpu")))
        expected, chosen = [], []
        for item in items:
            policy, lengths = sums(model, item)
            with model.disable_adapter():
                reference, _ = sums(model, item)
            for better, worse in item["pairs"]:
                numbers = (policy[better], policy[worse], reference[better], reference[worse])
                normed = [x / lengths[i] for x, i in zip(numbers, (better, worse, better, worse), strict=True)]
                ipo = dpo_loss(*(x[None] for x in normed), loss_type="ipo")[0]
                expected.append(0.5 * ipo + dpo_loss(*(x[None] for x in numbers))[0])
                chosen.append((policy[better], lengths[better]))
    nll = -sum(p for p, _ in chosen) / sum(n for _, n in chosen)
    torch.testing.assert_close(losses.mean().double(), torch.cat(expected).mean() + 0.1 * nll, rtol=1e-4, atol=1e-5)


def test_the_first_loss_is_log_2_and_then_it_falls(tmp_path: Path, tokenizer: Any) -> None:
    model = get_peft_model(loud_llama(), lora())
    trainer = make(tmp_path, tokenizer, model, max_steps=20, learning_rate=1e-2)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert losses_of(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert after["eval_rewards/accuracies"] > 0.9 and after["eval_loss"] < 0.6
    assert after["eval_logps/chosen"] - after["eval_logps/rejected"] > (
        before["eval_logps/chosen"] - before["eval_logps/rejected"]
    )
    line = next(line for line in trainer.state.log_history if "loss" in line)
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "entropy"}
    assert names <= set(line)


def test_logits_of_all_tokens_never_exist(tmp_path: Path, tokenizer: Any) -> None:
    trainer = make(tmp_path, tokenizer)
    called: list[int] = []
    trainer._head = LogprobHead(trainer.model, "test")
    head = trainer.model.get_output_embeddings()
    plain = head.forward
    head.forward = lambda x: called.append(x.numel()) or plain(x)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.compute_loss(trainer.model, batch).backward()
    assert not called


def test_accumulation_does_not_change_the_step(tmp_path: Path, tokenizer: Any) -> None:
    """Also with an SFT term, which is a mean over the tokens of the whole step."""
    common = {"train_sampling_strategy": "sequential", "loss_type": ["sigmoid", "sft"], "rows": RANKINGS}
    whole = make(tmp_path / "whole", tokenizer, **common)
    split = make(tmp_path / "split", tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=4, **common)
    whole.train()
    split.train()
    assert losses_of(split) == pytest.approx(losses_of(whole), rel=1e-4)


@pytest.mark.parametrize("kind", ["adapter", "model", "cache"])
def test_references_agree(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    """Adapter off, the same numbers from a second model, from an untrained second adapter, and from disk."""
    off = make(tmp_path / "off", tokenizer)
    off.train()
    model = get_peft_model(tiny_llama(), lora())
    changes: dict[str, Any] = {}
    if kind == "adapter":
        model.add_adapter("held", lora())
        changes["ref_adapter_name"] = "held"
    if kind == "cache":
        changes = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "cache")}
    other = make(tmp_path / kind, tokenizer, model, ref=tiny_llama() if kind == "model" else None, **changes)
    other.train()
    assert losses_of(other) == pytest.approx(losses_of(off), rel=1e-4)
    trained = {name for name, parameter in other.model.named_parameters() if parameter.requires_grad}
    assert trained == set(weights_of(off.model)), "the reference is as frozen as it was"


def test_the_cache_is_for_its_data_and_its_model(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    cached = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "cache"), "max_steps": 1}

    def run(model: Any, rows: Any) -> int:
        trainer = make(tmp_path / "run", tokenizer, model, rows, **cached)
        computed = []
        plain = trainer.reference_logps
        monkeypatch.setattr(trainer, "reference_logps", lambda *a: computed.append(1) or plain(*a))
        trainer.train()
        return len(computed)

    assert run(get_peft_model(tiny_llama(), lora()), PAIRS) > 0
    assert run(stirred(get_peft_model(tiny_llama(), lora())), PAIRS) == 0, "the adapter is not part of the reference"
    assert run(get_peft_model(tiny_llama(), lora()), PAIRS[:-1]) > 0
    assert run(get_peft_model(loud_llama(), lora()), PAIRS) > 0
    (file, *_) = sorted((tmp_path / "cache").iterdir())
    assert len(list((tmp_path / "cache").iterdir())) == 3
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"broken")
    assert run(get_peft_model(tiny_llama(), lora()), PAIRS) > 0, "a broken file is written anew"


def test_all_weights_from_the_cached_start(tmp_path: Path, tokenizer: Any) -> None:
    trainer = make(tmp_path, tokenizer, tiny_llama(), precompute_ref_log_probs=True)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses_of(trainer)[-1] < 0.68


def test_resume_is_exact(tmp_path: Path, tokenizer: Any) -> None:
    whole = make(tmp_path / "whole", tokenizer)
    whole.train()
    half = make(tmp_path / "half", tokenizer, max_steps=2, save_strategy="steps", save_steps=2)
    half.train()
    resumed = make(tmp_path / "half", tokenizer)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": tiny_llama}, "cannot be its own reference"),
        ({"ref_adapter_name": "other"}, "ref_adapter_name is 'other'; the model has default"),
        ({"ref_adapter_name": "default"}, "which is what is trained"),
        ({"loss_type": "dpo"}, "loss_type is 'dpo'"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "a weight for each of sigmoid, sft"),
        ({"loss_type": "exo_pair"}, "label_smoothing is 0.0; it must be above 0"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"layout": "flat"}, "layout is 'flat'"),
    ],
)
def test_mistakes(change: dict[str, Any], told: str, tmp_path: Path, tokenizer: Any) -> None:
    if "model" in change:
        change = {**change, "model": change["model"]()}
    with pytest.raises(UserError) as error:
        make(tmp_path, tokenizer, **change)
    assert told in str(error.value)


def test_a_model_of_its_own_as_reference_is_another(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_llama()
    with pytest.raises(UserError, match="the model itself"):
        make(tmp_path, tokenizer, model, ref=model)


def test_a_head_that_is_not_known_is_refused(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    """A model that scales its logits in a way of its own would get wrong log-probabilities."""
    model = tiny_llama()
    plain = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits * 3
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(UserError, match="in a way that is not known here"):
        make(tmp_path, tokenizer, get_peft_model(model, lora()))


def test_a_data_set_made_beforehand(tmp_path: Path, tokenizer: Any) -> None:
    dataset = build_preference_dataset(PAIRS, tokenizer, max_length=64)
    trainer = make(tmp_path, tokenizer, rows=dataset)
    assert trainer.train_dataset is dataset
