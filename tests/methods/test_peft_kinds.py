"""Side by side with stock PEFT, for what goes beyond plain LoRA: files both ways, starts, combinations, routing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.families import logits, moved, tiny, tokens
from safetensors.torch import load_file
from torch import nn

from fastpeft.methods import IA3Config, LoraConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model

peft = pytest.importorskip("peft", reason="peft is not installed")

LOGITS = {"rtol": 1e-5, "atol": 1e-5}  # fp32, two libraries, the same arithmetic in another order
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:Setting `save_embedding_layers`",
    "ignore:fan_in_fan_out is set",
    "ignore:Model has `tie_word_embeddings=True`",
)
CASES: dict[str, tuple[str, type, dict[str, Any]]] = {
    "dora": (
        "llama",
        LoraConfig,
        {"target_modules": ["v_proj", "up_proj"], "use_dora": True, "init_lora_weights": False},
    ),
    "dora-rslora-patterns": (
        "qwen3",
        LoraConfig,
        {
            "target_modules": ["q_proj", "down_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "embedding": ("llama", LoraConfig, {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "embedding-and-head": ("gemma3_text", LoraConfig, {"target_modules": ["embed_tokens", "lm_head"], "r": 4}),
    "dora-embedding": (
        "llama",
        LoraConfig,
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "init_lora_weights": False},
    ),
    "dora-embedding-and-head": (
        "qwen3",
        LoraConfig,
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True, "r": 4},
    ),
    "lora-conv1d": ("gpt2", LoraConfig, {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"], "r": 4}),
    "lora-default-conv1d": ("gpt2", LoraConfig, {}),
    "dora-conv1d": ("gpt2", LoraConfig, {"target_modules": ["c_attn"], "use_dora": True}),
    "lora-moe": ("mixtral", LoraConfig, {"target_modules": ["q_proj", "o_proj"]}),
    "ia3": ("llama", IA3Config, {}),
    "ia3-gemma3": ("gemma3_text", IA3Config, {"modules_to_save": ["norm"]}),
    "ia3-conv1d": ("gpt2", IA3Config, {}),
    "ia3-named": ("qwen3", IA3Config, {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}),
    "prompt": ("llama", PromptTuningConfig, {"num_virtual_tokens": 4}),
    "prompt-vocabulary": ("gpt2", PromptTuningConfig, {"num_virtual_tokens": 4, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p-tuning": ("llama", PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_hidden_size": 24}),
    "p-tuning-lstm": (
        "gemma3_text",
        PromptEncoderConfig,
        {"num_virtual_tokens": 4, "encoder_hidden_size": 24, "encoder_reparameterization_type": "LSTM"},
    ),
}
named = pytest.mark.parametrize(("family", "kind", "options"), CASES.values(), ids=list(CASES))


def both(family: str, kind: type, options: dict[str, Any]) -> tuple[PeftModel, Any]:
    models = []
    for build, config in (
        (get_peft_model, kind(**options, task_type="CAUSAL_LM")),
        (peft.get_peft_model, getattr(peft, kind.__name__)(**options, task_type="CAUSAL_LM")),
    ):
        base = tiny(family)
        torch.manual_seed(3)
        models.append(build(base, config))
    return models[0], models[1]


def of_text(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Stock PEFT gives logits of virtual tokens too."""
    return logits(model, ids)[:, -ids.shape[1] :]


@named
def test_begins_as_in_peft(family: str, kind: type, options: dict[str, Any]) -> None:
    ours, theirs = both(family, kind, options)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    torch.testing.assert_close(of_text(ours, tokens()), of_text(theirs, tokens()), **LOGITS)
    names, others = (
        [(n, p.shape) for n, p in model.named_parameters() if p.requires_grad and "prompt_encoder" not in n]
        for model in (ours, theirs)
    )
    assert names == others


@named
def test_our_file_is_pefts_file(family: str, kind: type, options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (moved(model) for model in both(family, kind, options))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    others = {key: tensor for key, tensor in others.items() if "base_layer" not in key}  # PEFT adds frozen embeddings
    assert {k: (t.shape, t.dtype) for k, t in mine.items()} == {k: (t.shape, t.dtype) for k, t in others.items()}
    configs = [peft.PeftConfig.from_pretrained(str(tmp_path / name)).to_dict() for name in ("ours", "theirs")]
    differing = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert differing <= {"num_attention_heads", "target_parameters"}, {
        key: [c[key] for c in configs] for key in differing
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns about keys that do not fit
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out|Model has `tie_word_embeddings=True`")
        loaded = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours")
    expected = of_text(ours, tokens())
    assert not torch.allclose(expected, logits(tiny(family), tokens()), atol=1e-4)
    torch.testing.assert_close(of_text(loaded, tokens()), expected, **LOGITS)


@named
def test_pefts_file_loads_here(family: str, kind: type, options: dict[str, Any], tmp_path: Path) -> None:
    _, theirs = both(family, kind, options)
    moved(theirs).save_pretrained(tmp_path)
    expected = of_text(theirs, tokens())
    ours = PeftModel.from_pretrained(tiny(family), tmp_path)
    torch.testing.assert_close(logits(ours, tokens()), expected, **LOGITS)
    if "num_virtual_tokens" not in options:
        torch.testing.assert_close(logits(ours.merge_and_unload(), tokens()), expected, **LOGITS)


@named
def test_losses_and_gradients_are_pefts(family: str, kind: type, options: dict[str, Any]) -> None:
    results = []
    for model in both(family, kind, options):
        model.train()
        loss = moved(model)(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        grads = {n.replace(".prompts.", "."): p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss, grads))
    (loss, grads), (reference, others) = results
    torch.testing.assert_close(loss, reference, **LOGITS)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_in_the_base_is_pefts_and_is_read_by_it(start: str, tmp_path: Path) -> None:
    """PEFT takes the start out of the base; here the base stays, and the file is an update of twice the rank."""
    ours, theirs = both("llama", LoraConfig, {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": start})
    for model in (ours, theirs):
        torch.testing.assert_close(logits(model, tokens()), logits(tiny(), tokens()), rtol=1e-4, atol=1e-4)
    for (name, one), (_, other) in zip(
        ((n, p) for n, p in ours.named_parameters() if p.requires_grad),
        ((n, p) for n, p in theirs.named_parameters() if p.requires_grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    expected = logits(moved(ours), tokens())
    torch.testing.assert_close(logits(moved(theirs), tokens()), expected, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / "ours")
    torch.testing.assert_close(logits(loaded, tokens()), expected, rtol=1e-4, atol=1e-4)


def test_shared_a_is_saved_once_for_each_layer(tmp_path: Path) -> None:
    ours = moved(get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", shared_a=True)))
    ours.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0.self_attn."
    assert torch.equal(saved[f"{layer}q_proj.lora_A.weight"], saved[f"{layer}v_proj.lora_A.weight"])
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path)
    torch.testing.assert_close(logits(loaded, tokens()), logits(ours, tokens()), **LOGITS)


def adapters(build: Any, config: type, ranks: tuple[int, int] = (4, 4), **options: Any) -> nn.Module:
    model = build(tiny(), config(target_modules=["q_proj", "down_proj"], r=ranks[0], lora_alpha=6, **options), "one")
    torch.manual_seed(8)
    model.add_adapter("two", config(target_modules=["q_proj", "v_proj"], r=ranks[1], lora_alpha=9, **options))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("kind", "ranks", "options"),
    [
        ("linear", (4, 4), {}),
        ("svd", (4, 2), {}),
        ("svd", (4, 2), {"svd_rank": 3}),
        ("cat", (4, 2), {}),
        ("ties", (4, 4), {"density": 0.5}),
        ("ties", (4, 4), {"density": 0.5, "majority_sign_method": "frequency"}),
        ("ties_svd", (4, 2), {"density": 0.3}),
        ("magnitude_prune", (4, 4), {"density": 0.4}),
        ("magnitude_prune_svd", (4, 2), {"density": 0.3}),
        ("dare_linear", (4, 4), {"density": 0.5}),
        ("dare_ties", (4, 4), {"density": 0.6}),
        ("dare_linear_svd", (4, 2), {"density": 0.5, "svd_rank": 3}),
        ("dare_ties_svd", (4, 2), {"density": 0.7}),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_weighted_combinations_are_pefts(
    kind: str, ranks: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DARE's draws meet the layers in another order in PEFT; here each shape and turn has draws of its own in both."""
    turns: dict[tuple[int, ...], int] = {}

    def bernoulli(shares: torch.Tensor) -> torch.Tensor:
        turn = turns[tuple(shares.shape)] = turns.get(tuple(shares.shape), 0) + 1
        generator = torch.Generator().manual_seed(turn % 2)  # of the two adapters, which take turns
        return (torch.rand(shares.shape, generator=generator) < shares).to(shares.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    results = []
    for build, config in ((get_peft_model, LoraConfig), (peft.get_peft_model, peft.LoraConfig)):
        model = adapters(build, config, ranks)
        turns.clear()
        add = model.add_weighted_adapter
        add(["one", "two"], [0.7, -0.4], "both", combination_type=kind, **options)
        model.set_adapter("both")
        results.append(logits(model, tokens()))
        assert model.peft_config["both"].r == (ranks[0] + ranks[1] if kind == "cat" else options.get("svd_rank", 4))
    assert not torch.allclose(results[0], logits(tiny(), tokens()), atol=1e-3)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_mixed_batch_is_pefts() -> None:
    names = ["one", "__base__", "two", "one"]
    ids, results = tokens(rows=4), []
    for build, config in ((get_peft_model, LoraConfig), (peft.get_peft_model, peft.LoraConfig)):
        model = adapters(build, config, (4, 2))
        results.append(logits(model, ids, adapter_names=names))
    torch.testing.assert_close(*results, **LOGITS)
