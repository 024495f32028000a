"""Estimates beside the tensors of real steps on the CPU, and beside peaks that an H100 had (bench/LOG.md)."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.families import METHODS, tiny
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from bench.tensor_memory import TensorMemory
from fastpeft.cli import main
from fastpeft.errors import UserError
from fastpeft.methods import (
    AdapterConfig,
    BottleneckAdapterConfig,
    FullConfig,
    IA3Config,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from fastpeft.models import accelerate, quantize
from fastpeft.nn import NF4Module
from fastpeft.optim import AdamW, AdamW8bit
from fastpeft.recipes.estimate import Setting, estimate, optimizer_bytes
from fastpeft.recipes.estimate_adapter import trained
from fastpeft.recipes.estimate_fit import nearest_fit, usable
from fastpeft.recipes.estimate_model import shape_of, shape_of_size, weight_bytes
from fastpeft.recipes.estimate_report import report, setting_of_options

BATCH, LENGTH, VIRTUAL = 4, 128, 16
LORA = LoraConfig(r=16, target_modules="all-linear")
CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small run several times slower on many threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def step_memory(
    method: AdapterConfig, quantized: bool, mode: Any, fused: bool, config: PretrainedConfig = CONFIG
) -> dict[str, int]:
    """Bytes of the tensors of the second step of training; those that exist within an op are not seen."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    if quantized:
        quantize(model)
    if fused:
        accelerate(model, checkpointing=mode)
    elif mode == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model = get_peft_model(model, method).train()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, CONFIG.vocab_size, (BATCH, LENGTH))
    found: dict[str, int] = {}
    with TensorMemory() as memory:
        memory.count(*model.parameters(), *model.buffers())
        found["weights"] = memory.alive
        for _ in range(2):
            found["steady"], memory.peak = memory.alive, memory.alive
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            found["gradients"] = memory.alive - found["steady"]
            optimizer.step()
            optimizer.zero_grad()
            gc.collect()
        found["peak"] = memory.peak
    return found


CASES: dict[str, tuple[AdapterConfig, bool, str]] = {
    "full": (FullConfig(), False, "full"),
    "full-none": (FullConfig(), False, "none"),
    "lora": (LORA, False, "full"),
    "lora-selective": (LORA, False, "selective"),
    "lora-none": (LORA, False, "none"),
    "qlora": (LORA, True, "full"),
    "qlora-offload": (LORA, True, "offload"),
    "dora": (LoraConfig(r=16, target_modules="all-linear", use_dora=True), False, "full"),
    "prompt": (PromptTuningConfig(num_virtual_tokens=VIRTUAL), False, "full"),
    "prompt-none": (PromptTuningConfig(num_virtual_tokens=VIRTUAL), False, "none"),
    "ia3": (IA3Config(), False, "full"),
    "houlsby": (BottleneckAdapterConfig("houlsby"), False, "full"),
    "houlsby-none": (BottleneckAdapterConfig("houlsby"), False, "none"),
    "plain-full": (FullConfig(), False, "full"),
    "plain-lora-none": (LORA, False, "none"),
    "plain-qlora": (LORA, True, "full"),
    "plain-prompt-none": (PromptTuningConfig(num_virtual_tokens=VIRTUAL), False, "none"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_within_a_tenth_of_the_tensors_of_a_step(name: str) -> None:
    """Those named plain are not accelerated, and have transformers' own checkpointing and loss."""
    method, quantized, mode = CASES[name]
    virtual, fused = VIRTUAL if "prompt" in name else 0, not name.startswith("plain")
    seen = step_memory(method, quantized, mode, fused)
    shape = shape_of(CONFIG, "test")
    setting = Setting(
        method,
        quantized,
        itemsize=4,
        weight_itemsize=4,
        batch=BATCH,
        length=LENGTH + virtual,
        checkpointing=mode,  # type: ignore[arg-type]
        fused=fused,
        device="cpu",
    )
    found = estimate(shape, setting)
    assert found.weights.total + found.adapters == pytest.approx(seen["weights"], rel=0.01)
    assert found.weights.total + found.adapters + found.optimizer == pytest.approx(seen["steady"], rel=0.01)
    assert found.gradients == pytest.approx(seen["gradients"], rel=0.01, abs=1 << 16)
    moments = dict(found.moments)
    if fused:
        moments["the loss"] -= 4 * CONFIG.vocab_size * BATCH * (LENGTH + virtual)  # one chunk, inside the op
    # Host memory is tensors too on a CPU.
    assert max(moments.values()) + found.activations_host == pytest.approx(seen["peak"], rel=0.1)
    dynamic = max(moments.values()) + found.activations_host - seen["steady"]
    assert dynamic == pytest.approx(seen["peak"] - seen["steady"], rel=0.2)


_SIZES: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 1, "intermediate_size": 512}
MIXTURES = {
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=8, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**_SIZES, head_dim=32, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=128),
}


@pytest.mark.parametrize("quantized", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("mode", ["full", "none"])
@pytest.mark.parametrize("family", list(MIXTURES))
@pytest.mark.parametrize("parameters", [None, ["experts.gate_up_proj", "experts.down_proj"]], ids=["", "experts"])
def test_within_a_tenth_of_the_tensors_of_a_mixtures_step(
    parameters: list[str] | None, family: str, mode: Any, quantized: bool
) -> None:
    """Qwen3's experts were taken to be as wide as a dense layer, which made it twice what it is."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    method = LoraConfig(r=4 if parameters else 16, target_modules=attention, target_parameters=parameters)
    seen = step_memory(method, quantized, mode, fused=False, config=MIXTURES[family])
    setting = Setting(
        method,
        quantized,
        itemsize=4,
        weight_itemsize=4,
        batch=BATCH,
        length=LENGTH,
        checkpointing=mode,
        fused=False,
        device="cpu",
    )
    found = estimate(shape_of(MIXTURES[family], family), setting)
    assert found.total - seen["steady"] == pytest.approx(seen["peak"] - seen["steady"], rel=0.1)


def test_experts_that_all_tokens_pass_count_too() -> None:
    config = Qwen2MoeConfig(
        **_SIZES, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=96, shared_expert_intermediate_size=256
    )
    shape = shape_of(config, "qwen2-moe")
    assert (shape.intermediate, shape.experts) == (4 * 96 + 256, 4)
    assert (shape_of(CONFIG, "llama").intermediate, shape_of(CONFIG, "llama").experts) == (512, 0)


def test_loftq_packs_no_experts() -> None:
    shape = shape_of(MIXTURES["mixtral"], "mixtral")
    loftq = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq")
    real = get_peft_model(AutoModelForCausalLM.from_config(MIXTURES["mixtral"]), loftq)
    experts = sum(p.numel() for name, p in real.named_parameters() if "experts" in name and p.is_floating_point())
    assert experts == 4 * 8 * 3 * 512 * 128
    found = estimate(shape, Setting(loftq)).weights
    assert 2 * experts < found.dense < 2 * experts + 2 * 300_000


# QLoRA, r = 16, 4 x 2048 tokens of Llama-3-8B's shape; entries of 2026-11-26 in bench/LOG.md.
@pytest.mark.parametrize(
    ("layers", "mode", "budget", "gigabytes"),
    [
        (32, "offload", None, 7.81),
        (32, "full", None, 11.72),
        (32, "selective", 33e9, 37.3),
        (8, "full", None, 5.39),
        (8, "none", None, 13.0),
    ],
)
def test_within_five_per_cent_of_an_h100(layers: int, mode: Any, budget: float | None, gigabytes: float) -> None:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    setting = Setting(LORA, True, batch=4, length=2048, checkpointing=mode)
    if budget is not None:
        setting = Setting(LORA, True, batch=4, length=2048, checkpointing=mode, activation_budget=int(budget))
    assert estimate(shape_of(config, "8B"), setting).total / 1e9 == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.parametrize("name", list(METHODS))
def test_trained_numbers_are_those_of_the_model(name: str) -> None:
    real = get_peft_model(tiny(), METHODS[name])
    found = trained(shape_of(tiny().config, "tiny").skeleton, METHODS[name])
    assert found.numbers == sum(p.numel() for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"block_size": 128}], ids=["double", "single", "128"])
def test_weights_are_those_of_the_model(family: str, options: dict[str, Any]) -> None:
    shape = shape_of(tiny(family).config, family)
    real = tiny(family).to(torch.bfloat16)
    assert shape.parameters == sum(p.numel() for p in real.parameters())
    assert weight_bytes(shape, 2).total == sum(p.nbytes for p in real.parameters())
    quantize(real, **options)
    modules = [m for m in real.modules() if isinstance(m, NF4Module)]
    packed = {id(m.get_parameter(name)): nf4.nbytes for m in modules for name, nf4 in m.packed.items()}
    expected = sum(packed.get(id(p), p.nbytes) for p in real.parameters())
    assert weight_bytes(shape, 2, True, **options).total == expected


def test_training_parts_of_a_model_counts_those() -> None:
    skeleton = shape_of(tiny().config, "tiny").skeleton
    before = [p.requires_grad for p in skeleton.parameters()]
    found = trained(skeleton, FullConfig(freeze=["embed_tokens"]))
    assert found.numbers == sum(p.numel() for n, p in tiny().named_parameters() if "embed_tokens" not in n)
    assert [p.requires_grad for p in skeleton.parameters()] == before
    saving = LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["lm_head"])
    assert trained(skeleton, saving).numbers == 2 * 4 * 128 + 64 * 96


def test_optimizer_state() -> None:
    model = nn.Linear(256, 64, bias=False)
    for kind, name in ((AdamW, "adamw"), (AdamW8bit, "adamw_8bit")):
        optimizer = kind(model.parameters(), lr=1e-3)
        model(torch.ones(1, 256)).sum().backward()
        optimizer.step()
        state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
        real = sum(v.nbytes for v in state if v.numel() > 256 or (v.dtype == torch.float32 and v.numel() == 64))
        assert optimizer_bytes(Setting(LORA, optimizer=name), 256 * 64) == (real, 0)
    paged = Setting(LORA, optimizer="paged_adamw", optim_budget=int(1e9))
    assert optimizer_bytes(paged, 10**9) == (10**9 + 3 * (16 << 20), 7 * 10**9)


def test_a_size_alone_is_a_llama() -> None:
    assert shape_of_size("8B").parameters == 8_030_261_248
    assert shape_of_size("65b").parameters == pytest.approx(65.2e9, rel=0.01)
    for params, count in (("20B", 20e9), ("500M", 500e6), ("1e9", 1e9)):
        assert shape_of_size(params).parameters == pytest.approx(count, rel=0.03)


def test_what_fits_is_found_and_changes_as_little_as_it_can() -> None:
    shape, setting = setting_of_options(None, "8B", "qlora", batch=4)
    assert nearest_fit(shape, setting, int(24e9)).changes == ()  # type: ignore[union-attr]
    near = nearest_fit(shape, setting, int(10e9))
    assert near is not None and near.changes == ("model.checkpointing=offload",)
    assert near.estimate.total <= usable(int(10e9)) < estimate(shape, setting).total
    less = nearest_fit(shape, setting, int(8e9))
    assert less is not None and less.setting.batch * less.setting.accumulation == 4
    assert nearest_fit(shape, setting, int(4e9)) is None
    shape, setting = setting_of_options(None, "65B", "full")
    whole = nearest_fit(shape, setting, int(80e9))
    assert whole is not None and whole.changes == ("peft.method=lora model.quantize=nf4",)


def test_the_page_says_it_all() -> None:
    shape, setting = setting_of_options(None, "8B", "qlora", batch=4)
    page = report(shape, setting, int(10e9), measured=11_720_000_000)
    for line in (
        "model      a Llama of 8B: 8.030 B parameters, 32 layers",
        "measured   11.72 GB in that run; predicted +0.2%",
        "it does not fit: 11.74 GB into 9.10 GB of the GPU's 10.00 GB",
        "this does, with 7.85 GB: model.checkpointing=offload",
    ):
        assert line in page
    assert [row.split()[0] for row in page.split("fits\n")[1].splitlines()[:5]] == [
        *("full", "lora", "qlora", "p_tuning", "adapter")
    ]


def write_run(folder: Path, **sections: Any) -> Path:
    (folder / "model").mkdir()
    CONFIG.save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text('{"input": "a", "output": "b"}\n')
    values: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "quantize": "nf4", "dtype": "bfloat16"},
        "peft": {"r": 8, "target_modules": "all-linear"},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 256},
        "train": {"output_dir": str(folder / "run"), "per_device_train_batch_size": 2, "report_to": "none"},
    }
    for name, section in sections.items():
        values[name] |= section
    file = folder / "config.yaml"
    file.write_text(json.dumps(values))
    return file


def test_a_yaml_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_run(tmp_path, model={"checkpointing": "offload"}, train={"optimizer": "paged_adamw_8bit"})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "memory_bytes": 50000000}\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(SystemExit) as left:
        main(["estimate", str(file), "train.per_device_train_batch_size=3", "--gpu-gb", "8"])
    page, complaint = capsys.readouterr()
    assert left.value.code in (0, None), complaint
    assert "3 rows of at most 256 tokens, checkpointing offload, paged_adamw_8bit" in page
    assert "of host memory" in page and "measured   0.05 GB" in page and "it fits" in page
    with pytest.raises(SystemExit):
        main(["estimate", str(file), "--json", "--kind", "dpo"])
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == max(found["moments"].values()) and found["trained"]["numbers"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "many"], "--params many: give a number of parameters"),
        (["--params", "8B", "--method", "qlorra"], "did you mean 'qlora'"),
        (["--params", "8B", "--checkpointing", "ful"], "did you mean 'full'"),
        (["--params", "8B", "--model", "x"], "one of --model"),
        ([], "one of --model"),
        (["--params", "8B", "--gpu-gb", "-1"], "--gpu-gb -1"),
        (["{file}", "--params", "8B"], "a YAML says which model"),
        (["{file}", "--kind", "ppoo"], "did you mean 'ppo'"),
        (["{file}", "model.path=/nowhere"], "model.path: there is no folder /nowhere"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_run(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["estimate", *(str(file) if part == "{file}" else part for part in arguments)])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(UserError, match="the configuration of mamba has no num_attention_heads"):
        shape_of(MambaConfig(), "mamba")
