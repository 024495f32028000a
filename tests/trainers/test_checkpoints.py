"""Checkpoints: whole or absent, without pickle, and a resumed run that is the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainers.tiny import assert_equal_weights, losses_of, tiny_llama, tiny_lora, weights_of
from transformers import AutoModelForCausalLM, TrainerCallback

from fastpeft.errors import UserError
from fastpeft.methods import PeftModel
from fastpeft.trainers import SFTTrainer
from fastpeft.trainers.checkpoint import (
    BrokenCheckpoint,
    commit,
    list_steps,
    newest_valid,
    rotate,
    sealed_steps,
    stage,
    staging_path,
    verify,
)
from fastpeft.trainers.state import capture_rng, load_state, restore_rng, save_state

MakeTrainer = Callable[..., SFTTrainer]


def write_checkpoint(run_dir: Path, step: int, resumable: bool = True) -> Path:
    target = run_dir / f"checkpoint-{step}"
    staging = stage(target)
    (staging / "weights").write_bytes(bytes(range(256)) * step)
    (staging / "adapter").mkdir()
    (staging / "adapter" / "config").write_text("{}")
    commit(staging, target, resumable=resumable)
    return target


# Folders.


def test_checkpoint_is_sealed_and_staging_is_gone(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path, 3)
    verify(target, resumable=True)
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["files"].keys() == {"weights", "adapter/config"}
    assert manifest["files"]["weights"]["bytes"] == 768
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def damage_cut_off(folder: Path) -> None:
    os.truncate(folder / "weights", 700)


def damage_missing(folder: Path) -> None:
    (folder / "weights").unlink()


def damage_changed(folder: Path) -> None:
    (folder / "weights").write_bytes(b"x" * 768)


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_half_a_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 40)


DAMAGES = {
    damage_cut_off: r"weights: it has 700 bytes where 768 were written",
    damage_missing: r"weights: the manifest names it and it is not there",
    damage_changed: r"weights: its content is not what was written",
    damage_no_manifest: r"has no manifest.json, so it is half-written",
    damage_half_a_manifest: r"manifest.json: it cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_an_older_checkpoint_taken(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 3)
    assert newest_valid(tmp_path) == new
    assert not caplog.records
    damage(new)
    with pytest.raises(BrokenCheckpoint, match=DAMAGES[damage]):
        verify(new)
    assert newest_valid(tmp_path) == old
    assert "CHECKPOINT 3 IS BROKEN" in caplog.text and f"older checkpoint {old}" in caplog.text
    damage(old) if damage is not damage_cut_off else damage_missing(old)
    with pytest.raises(
        UserError, match=r"none of the run's checkpoints can be used.*\n.*checkpoint-3.*\n.*checkpoint-2"
    ):
        newest_valid(tmp_path)


def test_an_unfinished_folder_is_never_picked_and_is_swept(tmp_path: Path) -> None:
    stage(tmp_path / "checkpoint-9")
    with pytest.raises(UserError, match="has no checkpoint-N folder"):
        newest_valid(tmp_path)
    write_checkpoint(tmp_path, 10)
    assert not staging_path(tmp_path / "checkpoint-9").exists()


def test_weights_alone_cannot_be_resumed_from(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, resumable=False)
    verify(folder)
    with pytest.raises(BrokenCheckpoint, match="save_only_model"):
        verify(folder, resumable=True)


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path, 1)
    (target / "stray").touch()
    write_checkpoint(tmp_path, 1)
    verify(target)
    assert not (target / "stray").exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("current", "limit", "keep", "left"),
    [
        (5, None, [], [1, 2, 3, 4, 5]),
        (5, 2, [], [4, 5]),
        (5, 2, [1], [1, 5]),
        (5, 1, [2], [2, 5]),
        (3, 2, [], [2, 3]),  # 4 and 5 were left by a course that was given up
    ],
)
def test_rotation(current: int, limit: int | None, keep: list[int], left: list[int], tmp_path: Path) -> None:
    for step in range(1, 6):
        write_checkpoint(tmp_path, step)
    rotate(tmp_path, current, limit, keep)
    assert list_steps(tmp_path) == left


def test_rotation_leaves_what_it_did_not_make(tmp_path: Path) -> None:
    """A checkpoint of transformers' own Trainer, or a link, in the same folder was deleted as the oldest."""
    for step in (3, 4, 5):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "checkpoint-3")
    rotate(tmp_path, 5, 2)
    assert list_steps(tmp_path) == [1, 4, 5] and (tmp_path / "checkpoint-2").is_symlink()
    assert sealed_steps(tmp_path) == [4, 5]


# State without pickle.


def test_state_survives_the_disk(tmp_path: Path) -> None:
    flat = torch.arange(6.0)
    tree = {
        "state": {0: {"step": 3, "m": flat[:3]}, 1: {"step": torch.tensor(2.0), "m": flat[3:].bfloat16()}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "nothing": None, "flag": True, "inf": float("inf")}],
        "numpy": np.float32(0.5),
    }
    save_state(tree, tmp_path, "thing")
    loaded = load_state(tmp_path, "thing")
    assert loaded["groups"] == tree["groups"] and loaded["numpy"] == 0.5
    assert loaded["groups"][0]["flag"] is True and isinstance(loaded["groups"][0]["betas"], tuple)
    assert loaded["state"].keys() == {0, 1} and loaded["state"][0]["step"] == 3
    for index in (0, 1):
        one, other = tree["state"][index]["m"], loaded["state"][index]["m"]  # type: ignore[index]
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_state_names_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"save_state: scheduler\['f'\]\[1\] is a function"):
        save_state({"f": [0, lambda: None]}, tmp_path, "scheduler")


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]

    draw()
    save_state(capture_rng(), tmp_path, "rng")
    expected = draw()
    draw()
    restore_rng(load_state(tmp_path, "rng"))
    assert draw() == expected


# Whole runs.


def untimed(trainer: SFTTrainer) -> list[dict[str, float]]:
    """Everything logged but the summary at the end, times and memory."""
    return [
        {key: value for key, value in line.items() if not key.endswith(("_second", "runtime", "_bytes"))}
        for line in trainer.state.log_history[:-1]
    ]


@pytest.mark.parametrize("model", ["full", "lora", "lora-nf4"])
def test_resumed_run_equals_the_uninterrupted_one(
    model: str, make_trainer: MakeTrainer, rows: list[dict[str, str]]
) -> None:
    """Bit for bit, from the middle of an epoch and of a logging window, with dropout, accumulation and evaluation."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 14,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 8,  # 22 rows, 6 steps an epoch: the second step of the second epoch
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_dataset": rows[:5],
        "weight_decay": 0.01,
    }
    whole = make_trainer(model, "whole", **options)
    whole.train()

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 10:
                raise KeyboardInterrupt

    first = make_trainer(model, "parts", callbacks=[Interrupt()], **options)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    second = make_trainer(model, "parts", **options)
    with torch.no_grad():
        for parameter in second.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    second.train(resume_from_checkpoint=True)

    assert_equal_weights(weights_of(whole.model), weights_of(second.model))
    assert untimed(whole) == untimed(second)

    files = [Path(trainer.args.output_dir) / "metrics.jsonl" for trainer in (whole, second)]
    steps = [[(line["step"], "loss" in line) for line in map(json.loads, file.open())] for file in files]
    assert steps[0] == steps[1]


@pytest.mark.gpu
def test_resume_on_a_gpu(make_trainer: MakeTrainer) -> None:
    options: dict[str, Any] = {"use_cpu": False, "max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tiny_lora(quantized=True, dtype=torch.bfloat16), **options)
    whole.train()
    assert next(whole.model.parameters()).is_cuda
    assert whole.state.log_history[0]["memory_bytes"] <= torch.cuda.max_memory_allocated()
    shutil.rmtree(Path(whole.args.output_dir) / "checkpoint-6")
    resumed = make_trainer(tiny_lora(quantized=True, dtype=torch.bfloat16), **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == pytest.approx(losses_of(whole), rel=1e-3)


@pytest.mark.parametrize("model", ["full", "lora"])
def test_a_run_falls_back_to_the_checkpoint_before(
    model: str, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    whole = make_trainer(model, **options)
    whole.train()
    run_dir = Path(whole.args.output_dir)
    assert list_steps(run_dir) == [6, 8]
    os.truncate(next((run_dir / "checkpoint-8").glob("*model.safetensors")), 100)
    resumed = make_trainer(model, **options)
    resumed.train(resume_from_checkpoint=True)
    assert "CHECKPOINT 8 IS BROKEN" in caplog.text
    assert_equal_weights(weights_of(whole.model), weights_of(resumed.model))
    verify(run_dir / "checkpoint-8", resumable=True)


def test_resuming_takes_the_options_of_now_and_repeats_no_step(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers went on with the checkpoint's logging_steps, and trained a step too many at the run's end."""
    first = make_trainer(max_steps=3, save_strategy="steps", save_steps=3, logging_steps=1)
    first.train()
    longer = make_trainer(max_steps=9, logging_steps=3)
    longer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in longer.state.log_history if "loss" in entry] == [1, 2, 3, 6, 9]
    assert not longer.nothing_to_do

    finished = make_trainer(max_steps=3)
    assert finished.train(resume_from_checkpoint=True).global_step == 3
    assert finished.nothing_to_do
    assert caplog.messages[-1] == "already at step 3 of 3; raise max_steps to go on"
    assert_equal_weights(weights_of(finished.model), weights_of(first.model))


def test_an_explicit_broken_checkpoint_is_an_error(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="there is no such folder"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    with pytest.raises(UserError, match="has no checkpoint-N folder; check output_dir"):
        make_trainer().train(resume_from_checkpoint=True)


def test_checkpoints_hold_no_pickle_and_the_adapter_alone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("lora-nf4", max_steps=1, save_strategy="steps")
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-1"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"} <= names
    assert {"training_args.json", "trainer_state.json", "tokenizer.json", "manifest.json"} <= names
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    assert json.loads((folder / "training_args.json").read_text())["max_steps"] == 1
    assert (folder / "adapter_model.safetensors").stat().st_size < 100_000

    reloaded = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)
    assert_equal_weights(weights_of(trainer.model), weights_of(reloaded))


def test_full_checkpoint_loads_in_transformers(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.save_model()
    reloaded = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    assert_equal_weights(weights_of(trainer.model), weights_of(reloaded))


def test_a_checkpoint_of_another_model_is_refused(make_trainer: MakeTrainer) -> None:
    options: dict[str, Any] = {"max_steps": 1, "save_strategy": "steps"}
    make_trainer("full", **options).train()
    with pytest.raises(UserError, match="adapter"):
        make_trainer("lora", **options).train(resume_from_checkpoint=True)
    shutil.rmtree(Path(make_trainer().args.output_dir))
    make_trainer("lora", **options).train()
    with pytest.raises(UserError, match="written for another kind of model"):
        make_trainer("full", **options).train(resume_from_checkpoint=True)


def test_save_only_model_leaves_out_the_optimizer(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("lora", max_steps=1, save_strategy="steps", save_only_model=True)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-1"
    assert not list(folder.glob("optimizer*"))
    with pytest.raises(UserError, match="holds the weights alone"):
        make_trainer("lora").train(resume_from_checkpoint=True)
