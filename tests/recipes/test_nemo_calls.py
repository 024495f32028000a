"""``fastpeft.nemo``: NeMo 2's calls end in a run folder, and their mistakes name the argument."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from fastpeft import nemo
from fastpeft.errors import UserError
from fastpeft.methods import IA3Config

QUIET = {"report_to": "none", "save_strategy": "no"}


@pytest.fixture
def squad(job: Path, rows: list[dict[str, str]], write_rows: Any) -> Path:
    """A folder as NeMo's SquadDataModule leaves it."""
    folder = job / "squad"
    folder.mkdir()
    write_rows(folder / "training.jsonl", rows)
    write_rows(folder / "validation.jsonl", rows[:2])
    return folder


def finetune(squad: Path, model: Path, **given: Any) -> Path:
    trainer = given.pop("trainer", nemo.Trainer(max_steps=2, precision=32, accelerator="cpu", log_every_n_steps=1))
    data = given.pop("data", nemo.SquadDataModule(squad, seq_length=64, micro_batch_size=2, global_batch_size=4))
    return nemo.finetune(nemo.AutoModel(model), data, trainer, say=lambda line: None, **given, **QUIET)


def settings(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return found


def test_positions_are_those_of_nemo() -> None:
    names = list(inspect.signature(nemo.finetune).parameters)
    assert names[:8] == ["model", "data", "trainer", "log", "resume", "optim", "peft", "tokenizer"]


def test_importing_it_costs_no_torch() -> None:
    script = "import sys, fastpeft.nemo; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], text=True, capture_output=True).stdout == "False\n"


def test_lora(squad: Path, model_folder: Path) -> None:
    peft = nemo.LoRA(dim=4, alpha=8, target_modules=["linear_qkv", "linear_fc1"])
    run = finetune(squad, model_folder, peft=peft, log=nemo.NeMoLogger(name="squad", log_dir="experiments"))
    assert run.parent == squad.parent / "experiments/squad"
    weights = load_file(run / "adapter/adapter_model.safetensors")
    assert len(weights) == 2 * 5 * 2
    said = settings(run)
    assert said["peft"]["target_modules"] == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    assert said["train"]["gradient_accumulation_steps"] == 2 and said["data"]["eval"].endswith("validation.jsonl")
    assert said["train"]["lr_scheduler_type"] == "cosine" and said["train"]["adam_beta2"] == 0.98


@pytest.mark.parametrize(
    ("peft", "expected"),
    [
        (nemo.CanonicalLoRA(dim=2, target_modules=["linear_q", "linear_fc1_up"]), {"layers.0.self_attn.q_proj"}),
        (nemo.DoRA(dim=2, target_modules=["linear_proj"]), {"lora_magnitude_vector", "o_proj"}),
        (nemo.LoRA(dim=2, target_modules=["*.layers.1.*.linear_qkv"]), {"layers.1.self_attn.v_proj"}),
        (nemo.LoRA(dim=2, exclude_modules=["linear_qkv"]), {"down_proj"}),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), {"ia3_l"}),
    ],
    ids=["canonical", "dora", "wildcard", "exclude", "ours"],
)
def test_methods(squad: Path, model_folder: Path, peft: Any, expected: set[str]) -> None:
    run = finetune(squad, model_folder, peft=peft)
    names = " ".join(load_file(run / "adapter/adapter_model.safetensors"))
    assert all(name in names for name in expected)
    if "layers.1" in next(iter(expected)):
        assert "layers.0" not in names
    if expected == {"down_proj"}:
        assert "q_proj" not in names and "gate_proj" in names


def test_without_peft_every_weight_trains_and_a_run_goes_on(squad: Path, model_folder: Path) -> None:
    log = nemo.NeMoLogger(explicit_log_dir="full")
    optim = nemo.MegatronOptimizerModule(nemo.OptimizerConfig(lr=1e-3, clip_grad=0.5), None)
    saving = {**QUIET, "save_strategy": "steps", "save_steps": 2}
    for steps in (2, 4):
        trainer = nemo.Trainer(max_steps=steps, precision="32", accelerator="cpu")
        data = nemo.FineTuningDataModule(squad, seq_length=64, micro_batch_size=2, global_batch_size=4)
        resume = nemo.AutoResume(resume_if_exists=True)
        said: list[str] = []
        run = nemo.finetune(str(model_folder), data, trainer, log, resume, optim, say=said.append, **saving)
    assert run == squad.parent / "full" and (run / "model/model.safetensors").is_file()
    assert (run / "checkpoint-4").is_dir() and not any("starting at the beginning" in line for line in said)
    assert settings(run)["train"]["max_grad_norm"] == 0.5


def test_the_newest_run_with_a_checkpoint_is_continued(squad: Path, model_folder: Path) -> None:
    options: dict[str, Any] = {"peft": nemo.LoRA(dim=2), "resume": nemo.AutoResume(resume_if_exists=True)}
    log = nemo.NeMoLogger(name="again")
    data = nemo.SquadDataModule(squad, seq_length=64, micro_batch_size=2, global_batch_size=4)
    runs = []
    for steps in (1, 2):
        trainer = nemo.Trainer(max_steps=steps, precision=32, accelerator="cpu")
        options["save_steps"] = 1
        runs.append(nemo.finetune(model_folder, data, trainer, log, say=lambda _: None, report_to="none", **options))
    assert runs[0] == runs[1] and (runs[1] / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"data": nemo.SquadDataModule()},
            "nemo.finetune: SquadDataModule.dataset_root is ''; nothing is downloaded, so that it has to be a folder",
        ),
        (
            {"data": "few"},
            "nemo.finetune: SquadDataModule.global_batch_size is 5; it has to be a multiple of micro_batch_size 2",
        ),
        (
            {"peft": nemo.LoRA(target_modules=["linear_qvk"])},
            "nemo.finetune: LoRA.target_modules: 'linear_qvk' is none of linear_qkv, linear_proj",
        ),
        ({"peft": nemo.LoRA(dim=0)}, "nemo.finetune: LoRA.dim: peft.r=0; a rank must be a whole number of at least 1"),
        (
            {"peft": nemo.LoRA(dropout=0.1, dropout_position="post")},
            "LoRA.dropout_position is 'post'; it must be 'pre'",
        ),
        ({"peft": nemo.LoRA(lora_A_init_method="xavir")}, "lora_A_init_method is 'xavir'; it must be one of xavier"),
        ({"peft": nemo.LoRA(lora_B_init_method="normal")}, "lora_B_init_method is 'normal'; use 'zero'"),
        ({"peft": 3}, "nemo.finetune: peft is a int; give LoRA, CanonicalLoRA, DoRA"),
        ({"trainer": nemo.Trainer(precision="bf8")}, "Trainer.precision is 'bf8'; it must be one of bf16"),
        ({"trainer": nemo.Trainer(num_nodes=2)}, "Trainer.num_nodes is 2; start the script with torchrun --nnodes"),
        ({"tokenizer": "other"}, "tokenizer is given; the model's own is used here"),
        (
            {"optim": nemo.MegatronOptimizerModule(nemo.OptimizerConfig(optimizer="lion"))},
            "OptimizerConfig.optimizer is 'lion'; it must be 'adam'",
        ),
        (
            {"optim": nemo.MegatronOptimizerModule(nemo.OptimizerConfig(lr=-1.0))},
            "nemo.finetune: OptimizerConfig.lr: train.learning_rate is -1.0; it must be 0 or more",
        ),
    ],
)
def test_a_mistake_names_the_argument(squad: Path, model_folder: Path, given: dict[str, Any], message: str) -> None:
    if given.get("data") == "few":
        given = {"data": nemo.SquadDataModule(squad, micro_batch_size=2, global_batch_size=5)}
    with pytest.raises(UserError) as caught:
        finetune(squad, model_folder, **given)
    assert message in str(caught.value)


def test_an_archive_of_nemo_is_refused(squad: Path) -> None:
    with pytest.raises(UserError, match=r"nemo\.finetune: model 'a\.nemo': a \.nemo archive is of another layout"):
        finetune(squad, Path("a.nemo"))
