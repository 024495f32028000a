"""quantize, merge and export: what is in the folder, that it loads elsewhere, and that a failure leaves nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from fastpeft.cli import main
from fastpeft.methods import LoraConfig, PeftModel, get_peft_model
from fastpeft.models import dequantize, load_pretrained, quantize
from fastpeft.nn import NF4Experts, NF4Linear

_IDS = torch.arange(5, 25)[None]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def trained(model: Any, folder: Path) -> Any:
    """An adapter of some effect, saved with the name of its base."""
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture(params=[True, False], ids=["bf16-products", "no-bf16-products"], autouse=True)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written does not depend on what this processor is fast at: a bfloat16 model once came out as float32."""
    monkeypatch.setattr("fastpeft.recipes.load.computes_in_bfloat16", lambda device: request.param)


@pytest.fixture
def adapter(tmp_path: Path, model_folder: Path) -> Path:
    trained(load_pretrained(model_folder), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """What ``fastpeft sft`` leaves of a run over a packed base."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(
        f"model:\n  path: {model_folder}\n  dtype: float32\n  quantize: nf4\n", encoding="utf-8"
    )
    trained(quantize(load_pretrained(model_folder, dtype=torch.float32)), folder / "adapter")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder / "adapter")
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(_IDS).logits


def held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- quantize ---
def test_quantize(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep/packed"
    options = ("--block-size", 128, "--no-double-quant", "--skip", "down_proj", "--max-shard-size", "60KB")
    assert run("quantize", model_folder, out, *options) == 0
    printed = capsys.readouterr().out
    assert "12 layers packed" in printed and f"written: {out}" in printed
    model = load_pretrained(out)
    expected = quantize(load_pretrained(model_folder), block_size=128, double_quant=False, skip=["down_proj"])
    state, other = model.state_dict(), expected.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert len(list(out.glob("*.safetensors"))) > 1
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (model_folder / name).read_bytes()
    assert held(tmp_path / "deep") == ["packed"]


def test_quantizing_twice_keeps_the_codes(tmp_path: Path, model_folder: Path) -> None:
    assert run("quantize", model_folder, tmp_path / "a") == 0
    assert run("quantize", tmp_path / "a", tmp_path / "b") == 0
    one, other = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_dry_run_says_the_size_and_writes_nothing(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize", model_folder, tmp_path / "packed", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "14 layers packed" in printed and "nothing was written" in printed
    assert held(tmp_path) == []
    assert run("quantize", model_folder, tmp_path / "packed") == 0
    said = float(printed.split("layers packed, ")[1].split(" MB")[0])
    layers = safetensors.torch.load_file(tmp_path / "packed/model.safetensors")
    constant = sum(value.nbytes for key, value in layers.items() if "quant_map" in key or "quant_state" in key)
    assert said == pytest.approx((sum(value.nbytes for value in layers.values()) - constant) / 1e6, abs=0.006)


# --- merge ---
@pytest.mark.parametrize("to", ["dense", "nf4"])
def test_merge(to: str, adapter: Path, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", adapter, tmp_path / "out", "--model", model_folder, "--to", to) == 0
    merged = PeftModel.from_pretrained(load_pretrained(model_folder), adapter).merge_and_unload()
    found = load_pretrained(tmp_path / "out")
    if to == "dense":
        assert torch.equal(logits(found), logits(merged))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(merged))
    else:
        assert torch.equal(logits(found), logits(quantize(merged)))
        assert "packing adds a relative error of " in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_merge_finds_the_base_by_itself(adapter: Path, tmp_path: Path, model_folder: Path) -> None:
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model_folder)
    assert run("merge", adapter, tmp_path / "out") == 0
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert run("merge", adapter, tmp_path / "other") == 2


# --- export ---
def test_export_dense_answers_like_the_run(finished_run: Path, tmp_path: Path, model_folder: Path) -> None:
    assert run("export", finished_run, tmp_path / "out") == 0
    base = quantize(load_pretrained(model_folder, dtype=torch.float32))
    as_trained = logits(PeftModel.from_pretrained(base, finished_run / "adapter"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(found), as_trained, rtol=1e-4, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_export_over_the_original_base(finished_run: Path, tmp_path: Path, model_folder: Path) -> None:
    assert run("export", finished_run, tmp_path / "out", "--original-base") == 0
    base = load_pretrained(model_folder, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, finished_run / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(load_pretrained(tmp_path / "out")), logits(expected), rtol=1e-5, atol=1e-6)


def test_export_nf4(finished_run: Path, tmp_path: Path) -> None:
    assert run("export", finished_run, tmp_path / "out", "--to", "nf4") == 0
    assert run("export", finished_run, tmp_path / "dense") == 0
    expected = quantize(load_pretrained(tmp_path / "dense"))
    found = load_pretrained(tmp_path / "out")
    assert sum(isinstance(module, NF4Linear) for module in found.modules()) == 14
    assert torch.equal(logits(found), logits(expected))
    torch.testing.assert_close(logits(dequantize(found)), logits(expected), rtol=1e-4, atol=1e-5)


def test_export_the_adapter_alone(finished_run: Path, tmp_path: Path) -> None:
    (finished_run / "adapter/optimizer.safetensors").write_bytes(b"state")
    assert run("export", finished_run, tmp_path / "out", "--to", "adapter") == 0
    names = held(tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(names)
    assert "optimizer.safetensors" not in names


# --- mistakes ---
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "{absent}", "{out}"), "there is no folder"),
        (("quantize", "{model}", "{model}"), "is or holds"),
        (("quantize", "{model}", "{out}", "--skip", "down_porj"), "did you mean 'down_proj'"),
        (("quantize", "{model}", "{out}", "--block-size", "100"), "block_size"),
        (("quantize", "{model}", "{out}", "--dtype", "int8"), "dtype"),
        (("merge", "{absent}", "{out}"), "is not an adapter folder"),
        (("merge", "{absent}", "{out}", "--model", "{model}"), "there is no such folder"),
        (("merge", "{adapter}", "{out}", "--to", "adapter"), "--to adapter; it must be dense or nf4"),
        (("merge", "{adapter}", "{out}", "--to", "nf5"), "did you mean 'nf4'"),
        (("merge", "{adapter}", "{adapter}/.."), "is or holds"),
        (("export", "{absent}", "{out}"), "is not a run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_code_2_and_writes_nothing(
    arguments: tuple[str, ...],
    message: str,
    adapter: Path,
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"absent": tmp_path / "absent", "out": tmp_path / "out", "model": model_folder, "adapter": adapter}
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.startswith("error: ") and "Traceback" not in shown
    assert held(tmp_path) == ["adapter"]


def test_only_a_model_is_replaced_and_only_on_request(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert run("quantize", model_folder, out) == 0
    assert run("quantize", model_folder, out) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    (out / "left.over").touch()
    assert run("quantize", model_folder, out, "--overwrite") == 0
    assert "left.over" not in held(out) and held(tmp_path) == ["out"]
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "to-anna.txt").touch()
    assert run("quantize", model_folder, letters, "--overwrite") == 2
    assert held(letters) == ["to-anna.txt"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.recipes import export

    shutil.copytree(model_folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_put_tokenizer", failing)
    assert run("quantize", model_folder, tmp_path / "out", "--overwrite") == 130
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert held(tmp_path) == ["out"]


def test_a_broken_adapter_is_refused_before_anything_is_loaded(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    next(iter(tensors.values())).fill_(float("nan"))
    safetensors.torch.save_file(tensors, file)
    assert run("merge", adapter, tmp_path / "out", "--dry-run") == 2


def test_a_full_disk_is_seen_before(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, 1))
    assert run("quantize", model_folder, tmp_path / "out") == 2


# --- mixtures of experts ---
@pytest.fixture(scope="module")
def mixture_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A run over a packed Mixtral, whose folder lies in it."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(
        f"model:\n  path: {folder / 'model'}\n  dtype: float32\n  quantize: nf4\n", encoding="utf-8"
    )
    base = quantize(load_pretrained(folder / "model", dtype=torch.float32))
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    return folder


def packed_experts(model: nn.Module) -> int:
    return sum(isinstance(module, NF4Experts) for module in model.modules())


@pytest.mark.parametrize("to", ["dense", "nf4", "adapter"])
def test_export_of_a_mixture(to: str, mixture_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", mixture_run, tmp_path / "out", "--to", to) == 0
    base = quantize(load_pretrained(mixture_run / "model", dtype=torch.float32))
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" if to == "adapter" else mixture_run / "adapter")
    if to == "adapter":
        expected = logits(adapted)
        assert torch.equal(logits(PeftModel.from_pretrained(adapted.unload(), mixture_run / "adapter")), expected)
        return
    merged = adapted.merge_and_unload()
    found = load_pretrained(tmp_path / "out")
    if to == "dense":
        assert torch.equal(logits(found), logits(dequantize(merged)))
        keys = safetensors.torch.load_file(tmp_path / "out/model.safetensors").keys()
        assert keys == safetensors.torch.load_file(mixture_run / "model/model.safetensors").keys()
    else:
        assert packed_experts(found) == 2
        assert torch.equal(logits(found), logits(quantize(dequantize(merged))))
        printed = capsys.readouterr().out
        assert "10 layers packed" in printed and "packing adds a relative error of " in printed


def test_quantize_of_a_mixture(mixture_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", mixture_run / "model", tmp_path / "out") == 0
    said = float(capsys.readouterr().out.split("10 layers packed, ")[1].split(" MB")[0])
    stored = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    constant = sum(value.nbytes for key, value in stored.items() if "quant_map" in key or "quant_state" in key)
    assert said == pytest.approx((sum(value.nbytes for value in stored.values()) - constant) / 1e6, abs=0.006)
    model = load_pretrained(tmp_path / "out")
    assert packed_experts(model) == 2
    assert torch.equal(logits(model), logits(quantize(load_pretrained(mixture_run / "model"))))
    assert run("quantize", mixture_run / "model", tmp_path / "dense-experts", "--skip", "experts") == 0
    assert packed_experts(load_pretrained(tmp_path / "dense-experts")) == 0
