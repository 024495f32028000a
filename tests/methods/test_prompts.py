"""Virtual tokens: where they stand, what they do to losses, positions, lengths and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.families import FAMILIES, METHODS, logits, moved, tiny, tokens
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from fastpeft.models import accelerate, quantize
from fastpeft.nn import PromptEncoder, SoftPrompt

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
families = pytest.mark.parametrize("family", list(FAMILIES))
ENCODERS = ["p-tuning-mlp", "p-tuning-lstm", "p-tuning-nemo"]


def make(name: str = "prompt", family: str = "llama", quantised: bool = False) -> PeftModel:
    base = quantize(tiny(family)) if quantised else tiny(family)
    return moved(get_peft_model(base, METHODS[name]))


def by_hand(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the text behind the virtual tokens, by the plain model."""
    with torch.no_grad():
        prompt = model.prompt_encoder.prompt("default").eval()()
        embeds = model.get_input_embeddings()(ids)
        whole = torch.cat((prompt.expand(len(ids), -1, -1), embeds), 1)
        return model.get_base_model().eval()(inputs_embeds=whole).logits[:, len(prompt) :]


@families
@pytest.mark.parametrize("name", ["prompt", "p-tuning-lstm"])
def test_they_stand_before_the_text(name: str, family: str) -> None:
    model, ids = make(name, family), tokens()
    torch.testing.assert_close(logits(model, ids), by_hand(model, ids), **CLOSE)


def test_padding_masks_positions_and_embeddings() -> None:
    model, ids = make(), tokens()
    expected = logits(model, ids)
    padded = torch.cat((ids, torch.zeros_like(ids[:, :4])), 1)
    mask = (padded != 0).long()
    torch.testing.assert_close(logits(model, padded, attention_mask=mask)[:, :11], expected, **CLOSE)
    positions = torch.arange(11).expand(2, -1)
    torch.testing.assert_close(logits(model, ids, position_ids=positions), expected, **CLOSE)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected, **CLOSE)
    with pytest.raises(UserError, match="attention_mask has 4 dimensions"):
        model(input_ids=ids, attention_mask=torch.zeros(2, 1, 11, 11))


@pytest.mark.parametrize("accelerated", [False, True])
def test_they_stand_before_each_text_of_a_packed_row(accelerated: bool) -> None:
    model = make()
    if accelerated:
        accelerate(model)
    one, two = tokens(1, 7), tokens(1, 11)[:, 4:9] + 3
    apart = torch.cat((logits(model, one), logits(model, two)), 1)
    row = torch.cat((one, two), 1)
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None]
    torch.testing.assert_close(logits(model, row, position_ids=positions), apart, **CLOSE)
    keep = torch.tensor([0, 6, 8])
    kept = logits(model, row, position_ids=positions, logits_to_keep=keep)
    torch.testing.assert_close(kept, apart[:, keep], **CLOSE)
    labels = row.clone()
    labels[0, 7] = -100
    whole = model(input_ids=row, position_ids=positions, labels=labels).loss
    losses = [model(input_ids=text, labels=text).loss for text in (one, two)]
    first = torch.nn.functional.cross_entropy(
        model(input_ids=two, labels=two, logits_to_keep=0).logits[:, :-1].flatten(0, 1), two[0, 1:], reduction="sum"
    )
    torch.testing.assert_close(whole * 11, losses[0] * 7 + first, **CLOSE)
    rows = torch.cat((row, row))
    with pytest.raises(UserError, match="hold 2, 1 packed texts"):
        model(input_ids=rows, position_ids=torch.cat((positions, torch.arange(12)[None])))


def test_only_the_positions_asked_for_are_computed() -> None:
    model, ids = make(), tokens()
    expected = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=torch.tensor([2, 7])), expected[:, [2, 7]], **CLOSE)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=3), expected[:, -3:], **CLOSE)
    as_tuple = model(input_ids=ids, labels=ids, return_dict=False)
    torch.testing.assert_close(as_tuple[1], expected, **CLOSE)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("checkpointing", [None, "full", "selective"])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ENCODERS[1:]])
def test_accelerated_models_train_the_same(name: str, checkpointing: str | None) -> None:
    grads, losses = [], []
    ids = tokens()
    for how in ("plain", "before", "after"):
        model = tiny()
        if how == "before":
            accelerate(model, checkpointing=checkpointing)
        torch.manual_seed(2)
        model = get_peft_model(model, METHODS[name])
        for config in model.peft_config.values():
            assert config.PEFT_TYPE
        if how == "after":
            accelerate(model, checkpointing=checkpointing)
        moved(model).train()
        for module in model.modules():
            for option in ("dropout", "lora_dropout"):  # drawn in another order by the fused ops
                if isinstance(getattr(module, option, None), float):
                    setattr(module, option, 0.0)
                elif isinstance(getattr(module, option, None), dict):
                    setattr(module, option, dict.fromkeys(getattr(module, option), 0.0))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for loss, found in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], **CLOSE)
        assert found.keys() == grads[0].keys()
        for key, grad in found.items():
            torch.testing.assert_close(grad, grads[0][key], rtol=1e-3, atol=1e-5, msg=key)


# Generation.


@families
@pytest.mark.parametrize("name", ["prompt", "p-tuning-mlp"])
def test_generation_with_a_cache_is_greedy_by_hand(name: str, family: str) -> None:
    model, ids = make(name, family), tokens(length=7)
    answer = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    by_steps = ids
    for _ in range(6):
        by_steps = torch.cat((by_steps, by_hand(model, by_steps)[:, -1:].argmax(-1)), 1)
    assert torch.equal(answer, by_steps)
    assert torch.equal(
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_length=13, do_sample=False, eos_token_id=None
        ),
        answer,
    )


def test_generation_on_nf4_with_left_padding_beams_and_samples() -> None:
    model, ids = make(quantised=True), tokens(length=7)
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None}
    plain = model.generate(ids, do_sample=False, **options)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    assert torch.equal(model.generate(padded, do_sample=False, **options)[:, 3:], plain)
    beams = model.generate(ids, num_beams=3, num_return_sequences=2, do_sample=False, **options)
    assert beams.shape == (4, 12) and torch.equal(beams[::2, :7], ids)
    sampled = model.generate(ids, do_sample=True, num_return_sequences=2, **options)
    assert sampled.shape == (4, 12)
    config = GenerationConfig(max_length=12, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    assert torch.equal(model.generate(ids, generation_config=config).sequences, plain)
    assert config.max_length == 12
    with pytest.raises(UserError, match="need a KV cache of their own"):
        model.generate(ids, use_cache=False)


def test_a_cache_filled_by_a_call_is_gone_on_from() -> None:
    model, ids = make(), tokens()
    with torch.no_grad():
        first = model.eval()(input_ids=ids[:, :8], use_cache=True)
        rest = model(input_ids=ids[:, 8:], past_key_values=first.past_key_values, attention_mask=torch.ones(2, 11))
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), logits(model, ids), **CLOSE)


def test_generation_without_them_is_the_base() -> None:
    model, ids = make(), tokens()
    with model.disable_adapter():
        assert torch.equal(
            model.generate(ids, max_new_tokens=4, do_sample=False),
            tiny().generate(ids, max_new_tokens=4, do_sample=False),
        )


# Beginnings.


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = {"<unk>": 0, "say": 5, "it": 6, "well": 7}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(("count", "ids"), [(2, [5, 6]), (3, [5, 6, 7]), (7, [5, 6, 7, 5, 6, 7, 5])])
def test_a_text_is_cut_or_repeated(tokenizer: Path, count: int, ids: list[int], tmp_path: Path) -> None:
    config = PromptTuningConfig(
        num_virtual_tokens=count,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="say it well",
        tokenizer_name_or_path=str(tokenizer),
    )
    model = get_peft_model(tiny(), config)
    assert torch.equal(model.adapter_state_dict()["prompt_embeddings"], model.get_input_embeddings().weight[ids])
    model.save_pretrained(tmp_path / "adapter")
    for file in tokenizer.iterdir():
        file.unlink()
    PeftModel.from_pretrained(tiny(), tmp_path / "adapter")  # whoever loads it needs no tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0; must be a whole number"),
        ({"prompt_tuning_init": "TEST"}, "did you mean 'TEXT'"),
        ({"prompt_tuning_init": "TEXT"}, "'TEXT' needs prompt_tuning_init_text"),
        ({"num_transformer_submodules": 2}, "for encoder-decoder models"),
        ({"token_dim": 32}, "32 numbers wide and this model's are 64"),
        ({"task_type": "SEQ_CLS"}, "trains a task head"),
    ],
    ids=str,
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_peft_model(tiny(), PromptTuningConfig(**options))


def test_needs_a_language_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(UserError, match="virtual tokens need a decoder"):
        get_peft_model(model, PromptTuningConfig())
    with pytest.raises(UserError, match="must be one of 'MLP', 'LSTM', 'NEMO'"):
        PromptEncoderConfig(encoder_reparameterization_type="RNN")


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": str(tmp_path)}
    with pytest.raises(UserError, match="tokenizer_name_or_path: no tokenizer could be loaded"):
        get_peft_model(tiny(), PromptTuningConfig(**options))


# Files.


@pytest.mark.parametrize("name", ENCODERS)
def test_files_hold_the_tokens_and_beside_them_the_encoder(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["prompt_embeddings"]
    assert "embedding.weight" in load_file(tmp_path / "prompt_encoder.safetensors")
    assert (tmp_path / "fastpeft.json").exists() == (name == "p-tuning-nemo")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    assert isinstance(loaded.prompt_encoder.prompt("default"), PromptEncoder)


def test_tokens_alone_load_and_train_as_they_are(tmp_path: Path) -> None:
    model = make("p-tuning-mlp")
    model.save_pretrained(tmp_path)
    (tmp_path / "prompt_encoder.safetensors").unlink()
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert isinstance(loaded.prompt_encoder.prompt("default"), SoftPrompt)
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), **CLOSE)
    with pytest.warns(UserWarning, match="its file has no encoder"):
        trainable = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    assert [n for n, p in trainable.named_parameters() if p.requires_grad] == [
        "prompt_encoder.prompts.default.embedding.weight"
    ]
    with pytest.raises(UserError, match="without the encoder that made them"):
        model.load_adapter_weights(tmp_path)


def test_an_encoder_of_another_save_is_found_out(tmp_path: Path) -> None:
    model = make("p-tuning-mlp")
    model.save_pretrained(tmp_path)
    file = tmp_path / "prompt_encoder.safetensors"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_file({key: tensor + 0.01 for key, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match="do not belong together"):
        model.load_adapter_weights(tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    make("p-tuning-lstm").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its encoder is another one than this adapter's"):
        model.load_adapter_weights(tmp_path)


def test_a_folder_keeps_no_file_of_an_earlier_adapter(tmp_path: Path) -> None:
    make("p-tuning-nemo").save_pretrained(tmp_path)
    get_peft_model(tiny(), LoraConfig()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
