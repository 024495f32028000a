"""The demo runs from end to end on a model of two tiny layers, and its scoring counts what it says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["order"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def scoring(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("orders.score")


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("demo")


def test_answers_do_not_depend_on_the_batch(scoring, model, tokenizer):
    rows = [{"input": "x" * length, "output": ""} for length in (3, 40, 11, 25)]
    together = scoring.answer(model, tokenizer, rows, max_new_tokens=8, batch_size=4)
    alone = [scoring.answer(model, tokenizer, [row], max_new_tokens=8)[0] for row in rows]
    assert together == alone
    assert all(together)


def test_stopping_when_wrong_changes_no_verdict(scoring, model, tokenizer):
    rows = [{"input": "abc", "output": ""}, {"input": "de", "output": "surely not this"}, {"input": "f", "output": ""}]
    rows[0]["output"] = scoring.answer(model, tokenizer, rows[:1], max_new_tokens=12)[0]
    early = scoring.answer(model, tokenizer, rows, max_new_tokens=12, until_wrong=True)
    assert early[0] == rows[0]["output"]
    assert 0 < len(early[1]) < len(scoring.answer(model, tokenizer, rows[1:2], max_new_tokens=12)[0])
    assert scoring.score(early, rows).correct == 1


def test_score_counts_exact_matches_and_unseen_ones(scoring):
    rows = [{"output": "a", "template": "x"}, {"output": "b", "template": "x"}, {"output": "c", "template": "new"}]
    result = scoring.score(["a", "b ", "c"], rows, unseen=("new",))
    assert (result.rows, result.correct, result.unseen_rows, result.unseen_correct) == (3, 2, 1, 1)
    assert str(result) == "2 of 3 (66.7%), of the unseen wordings 1 of 1"


def test_the_demo_from_end_to_end(demo, model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "run"
    overrides = [f"model.path={tmp_path / 'model'}", "model.gguf_file=null", "train.report_to=none"]
    small = ["train.per_device_train_batch_size=2", "train.eval_strategy=no", "train.logging_steps=1"]
    for _ in range(2):  # the second run replaces the first
        code = demo.main(["--steps", "2", "--rows", "10", "--out", str(out), *overrides, *small])
        assert code == 0, capsys.readouterr().err
    result = json.loads((out / "demo.json").read_text())
    assert result["steps"] == 2
    assert result["exact_match_before"]["rows"] == result["exact_match_after"]["rows"] == 10
    assert set(result["seconds"]) == {"load", "score_before", "train", "score_after", "total"}
    assert len(result["wrong"]) == 10 - result["exact_match_after"]["correct"]
    for name in ("config.yaml", "metrics.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        assert (out / name).is_file(), name
    shown = capsys.readouterr().out
    assert "exact match before" in shown and "exact match after" in shown
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_demo_replaces_nothing_that_it_did_not_make(demo, tmp_path, capsys):
    """``--out .`` once deleted every adapter/ and checkpoint-N/ that stood there."""
    own = tmp_path / "adapter" / "adapter_config.json"
    own.parent.mkdir()
    own.write_text("{}")
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert "nothing shows that a fastpeft run made it" in capsys.readouterr().err
    assert own.read_text() == "{}"


def test_the_demo_says_what_is_wrong(demo, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "run"), "model.path=package:no_such_package"]) == 2
    assert "no_such_package" in capsys.readouterr().err
    assert demo.main(["train.max_stepz=3"]) == 2
    assert "max_steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
