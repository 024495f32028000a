"""fastpeft's layers under the PEFT library itself: same numbers, same files, exact unmerging."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from models.families import batch, tiny
from tolerances import relative_error
from torch import nn

import fastpeft
from fastpeft.errors import UserError
from fastpeft.models import quantize, use_in_peft
from fastpeft.nn import NF4Linear

peft = pytest.importorskip("peft", reason="needs the package peft, which is not installed")


def adapted(model: nn.Module, dense: bool = True, stock: bool = False, seed: int = 3, **options: Any) -> Any:
    """A PEFT model whose adapters are not zero."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    if options.get("target_modules") is None and any(isinstance(m, NF4Linear) for m in model.modules()):
        # PEFT's "all-linear" knows the layers of libraries that it knows.
        config.target_modules = r".*(q|k|v|o|gate|up|down)_proj"
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config if stock else use_in_peft(config, dense))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def fused(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "FusedLora"]


def unpacked(model: nn.Module) -> nn.Module:
    return fastpeft.models.dequantize(copy.deepcopy(model), torch.float32)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_logits_and_gradients_are_pefts(packed: bool) -> None:
    model = quantize(tiny("llama-biases")) if packed else tiny("llama-biases")
    plain = adapted(unpacked(model), stock=True)
    ours = adapted(model)
    assert len(fused(ours)) == 14 and not fused(plain)
    logits, losses = [], []
    for each in (ours, plain):
        out = each(**batch())
        out.loss.backward()
        logits.append(out.logits)
        losses.append(out.loss)
    assert relative_error(*logits) < 1e-5
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], expected[name]) < 1e-4 for name in found)


def test_the_fused_op_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.models import stock_peft

    calls = []
    op = stock_peft.lora_linear
    monkeypatch.setattr(stock_peft, "lora_linear", lambda *given: (calls.append(given[-2:]), op(*given))[1])
    model = adapted(quantize(tiny("llama")), lora_dropout=0.25)
    model.train()(**batch())
    assert len(calls) == 14 and set(calls) == {(0.25, True)}
    model.eval()(**batch())
    assert calls[-1] == (0.25, False)


def test_files_go_both_ways(tmp_path: Path) -> None:
    ours = adapted(quantize(tiny("llama"))).eval()
    ours.save_pretrained(tmp_path)
    inputs = batch()["input_ids"]
    config = use_in_peft(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(quantize(tiny("llama")), tmp_path, config=config).eval()
    assert torch.equal(again(inputs).logits, ours(inputs).logits)
    here = fastpeft.PeftModel.from_pretrained(quantize(tiny("llama")), tmp_path).eval()
    torch.testing.assert_close(here(inputs).logits, ours(inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_merging_and_back(packed: bool) -> None:
    ours = adapted(quantize(tiny("llama")) if packed else tiny("llama")).eval()
    inputs = batch()["input_ids"]
    before = ours(inputs).logits
    ours.merge_adapter(safe_merge=True)
    assert relative_error(ours(inputs).logits, before) < 1e-5
    ours.unmerge_adapter()
    if packed:
        assert torch.equal(ours(inputs).logits, before)
    plain = ours.merge_and_unload()
    assert not fused(plain) and not any(isinstance(module, NF4Linear) for module in plain.modules())
    assert relative_error(plain(inputs).logits, before) < 1e-5


def test_a_broken_adapter_does_not_merge() -> None:
    ours = adapted(quantize(tiny("llama")))
    fused(ours)[0].lora_A["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_adapter(safe_merge=True)
    assert isinstance(fused(ours)[0].base_layer, NF4Linear)


def test_several_adapters_and_none() -> None:
    ours = adapted(quantize(tiny("llama"))).eval()
    inputs = batch()["input_ids"]
    with ours.disable_adapter():
        base = ours(inputs).logits
    assert torch.equal(base, quantize(tiny("llama")).eval()(inputs).logits)
    one = ours(inputs).logits
    ours.add_adapter("other", use_in_peft(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)))
    ours.base_model.set_adapter(["default", "other"])
    both = ours(inputs).logits
    assert relative_error(both, one) > 1e-4
    mixed = ours(inputs, adapter_names=["default", "__base__"]).logits
    assert relative_error(mixed[:1], one[:1]) < 1e-5 and relative_error(mixed[1:], base[1:]) < 1e-5


def test_dora_works_on_a_dense_base_and_is_refused_on_a_packed_one() -> None:
    ours, plain = (adapted(tiny("llama"), use_dora=True, stock=stock).eval() for stock in (False, True))
    inputs = batch()["input_ids"]
    assert torch.equal(ours(inputs).logits, plain(inputs).logits)
    with pytest.raises(UserError, match="DoraLinearVariant reads the base's dense weight"):
        adapted(quantize(tiny("llama")), use_dora=True)


def test_only_packed_layers_on_request() -> None:
    model = quantize(tiny("llama"), skip=["down_proj"])
    names = {name.rpartition(".")[2] for name, m in adapted(model, dense=False).named_modules() if m in fused(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


def test_refuses_what_is_no_peft_config() -> None:
    with pytest.raises(UserError, match=r"needs a peft\.LoraConfig"):
        use_in_peft(fastpeft.LoraConfig())
    with pytest.raises(UserError, match=r"needs a peft\.LoraConfig"):
        use_in_peft(peft.IA3Config())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the package trl, which is not installed")
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_under_trl(kind: str, tmp_path: Path) -> None:
    """TRL's trainers wrap and train a packed model; only adapters change, and the loss falls."""
    import trl
    from datasets import Dataset
    from recipes.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.pad_token = tokenizer.eos_token
    model = quantize(tiny("llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id))
    codes = model.model.layers[0].mlp.up_proj.weight.clone()
    prompts, answers = [f"Add {n} and {n + 1}." for n in range(8)], [f" It is {2 * n + 1}." for n in range(8)]
    columns = {"completion": answers} if kind == "SFT" else {"chosen": answers, "rejected": [" I do not know."] * 8}
    arguments = getattr(trl, f"{kind}Config")(
        str(tmp_path),
        max_steps=12,
        logging_steps=1,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts, **columns}),
        processing_class=tokenizer,
        peft_config=use_in_peft(peft.LoraConfig(r=4, target_modules=r".*_proj", task_type="CAUSAL_LM")),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(fused(trainer.model)) == 14 and losses[-1] < losses[0]
    layer = next(m for n, m in trainer.model.named_modules() if n.endswith("layers.0.mlp.up_proj"))
    assert torch.equal(layer.base_layer.weight, codes)
