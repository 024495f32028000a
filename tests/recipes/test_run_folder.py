"""What may happen to a run folder: other people's files, earlier runs, starts that fail, and resumed runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import TrainerCallback

from fastpeft.cli import main
from fastpeft.errors import UserError
from fastpeft.recipes import load_config, run_sft
from fastpeft.recipes import sft as sft_recipe
from fastpeft.recipes.run_folder import check_run_folder
from fastpeft.trainers import SFTTrainer

SAVE = ["train.save_strategy=steps", "train.save_steps=1"]
OVERWRITE = "train.overwrite=true"
RESUME = "train.resume=true"


def run(*overrides: str) -> int:
    """Exit code of ``fastpeft sft job.yaml ...`` in this process."""
    with pytest.raises(SystemExit) as left:
        main(["sft", "job.yaml", *overrides])
    code = left.value.code
    return 0 if code is None else int(code)


def train(*overrides: str) -> list[str]:
    """Run; what was said."""
    said: list[str] = []
    run_sft(load_config("job.yaml", overrides), said.append)
    return said


def check(*overrides: str) -> bool:
    return check_run_folder(load_config("job.yaml", overrides))


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, with the folders as empty entries."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def logged_steps(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


# Files that no run made.


def test_overwriting_spares_the_users_own_base_model(job: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]):
    """With output_dir=. and overwrite, the base model in ./model was deleted: the name alone made it a run's."""
    shutil.copytree(model_folder, job / "model")
    before = files(job)
    assert run("train.output_dir=.", OVERWRITE, "model.path=model") == 2
    assert capsys.readouterr().err == (
        f"error: override 'train.output_dir=.': train.output_dir {job} holds model, and nothing shows that a fastpeft "
        "run made it, so nothing is replaced; move that away, or name another folder\n"
    )
    assert files(job) == before


@pytest.mark.parametrize(
    "name", ["adapter/notes", "model/notes", "checkpoint-3/notes", "config.yaml", "metrics.jsonl", "loss.png"]
)
@pytest.mark.parametrize("option", [OVERWRITE, RESUME, "train.seed=1"])
def test_a_name_alone_makes_nothing_a_runs(job: Path, name: str, option: str):
    (job / "out" / name).parent.mkdir(parents=True)
    (job / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds {name.partition('/')[0]}, and nothing shows that a fastpeft run made"):
        check(option)
    assert (job / "out" / name).read_text() == "mine"


def test_a_run_vouches_for_its_own_result_alone(job: Path):
    """A folder put beside a run's later, under a name that the run did not use, is not the run's."""
    train("train.max_steps=1")
    assert check(OVERWRITE) is False
    (job / "out" / "model").mkdir()
    with pytest.raises(UserError, match="holds model, and nothing shows"):
        check(OVERWRITE)
    (job / "out" / "model").rmdir()
    shutil.move(job / "out" / "adapter", job / "mine")
    (job / "out" / "adapter").symlink_to(job / "mine")
    with pytest.raises(UserError, match="holds adapter, and nothing shows"):
        check(OVERWRITE)


def test_a_copied_config_says_nothing_about_another_folder(job: Path):
    train("train.max_steps=1")
    (job / "other" / "adapter").mkdir(parents=True)
    shutil.copy(job / "out" / "config.yaml", job / "other" / "config.yaml")
    with pytest.raises(UserError, match="holds adapter, and nothing shows"):
        check("train.output_dir=other", OVERWRITE)


def test_a_folder_that_was_moved_can_be_resumed_and_replaced(job: Path):
    train(*SAVE, "train.max_steps=1")
    (job / "out").rename(job / "moved")
    assert check("train.output_dir=moved", RESUME) is True
    assert check("train.output_dir=moved", OVERWRITE) is False


def test_what_a_trainer_without_a_yaml_left_is_known_by_its_checkpoints(job: Path):
    train(*SAVE, "train.max_steps=1")
    (job / "out" / "config.yaml").unlink()
    shutil.rmtree(job / "out" / "adapter")
    assert check(OVERWRITE) is False and check(RESUME) is True
    (job / "out" / "adapter").mkdir()
    for option in (OVERWRITE, RESUME):
        with pytest.raises(UserError, match="holds adapter, and nothing shows"):
            check(option)


def test_the_model_and_the_data_are_never_replaced(job: Path, model_folder: Path):
    train(*SAVE, "peft.method=none", "train.max_steps=1")
    shutil.copy(job / "train.jsonl", job / "out" / "model" / "rows.jsonl")
    base, rows = job / "out" / "model", job / "out" / "model" / "rows.jsonl"
    for option in (OVERWRITE, RESUME):
        with pytest.raises(UserError, match=f"would replace {base}, which is or holds model.path {base}; name another"):
            check(option, f"model.path={base}")
        with pytest.raises(UserError, match=f"would replace {base}, which is or holds data.eval {rows}; name another"):
            check(option, f"data.eval={rows}")
    inside = shutil.copytree(job / "out", shutil.copytree(model_folder, job / "base") / "out")
    with pytest.raises(UserError, match=f"would replace {inside}/.*, which is part of model.path {job / 'base'};"):
        check("train.output_dir=base/out", OVERWRITE, "model.path=base")
    assert check("train.output_dir=base/out", RESUME, "model.path=base") is True


# Earlier runs.


def test_overwriting_deletes_what_the_run_made_and_nothing_else(job: Path):
    out = job / "out"
    train(*SAVE, "train.max_steps=3", "peft.method=none")
    kept = {"notes.txt": b"mine", "checkpoint-best": b"", "checkpoint-best/a": b"b"}
    (out / "notes.txt").write_bytes(b"mine")
    (out / "checkpoint-best").mkdir()
    (out / "checkpoint-best" / "a").write_bytes(b"b")
    train("train.max_steps=1", OVERWRITE)
    assert {path.name for path in out.iterdir()} == {
        *("adapter", "config.yaml", "loss.png", "metrics.jsonl"),
        *("notes.txt", "checkpoint-best"),
    }
    assert {name: content for name, content in files(out).items() if name in kept} == kept
    assert logged_steps(out) == [1]


@pytest.mark.parametrize("method", ["__init__", "create_optimizer"])
def test_a_start_that_fails_leaves_the_old_run(job: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    """The first run was deleted before the trainer of the second was made, which then refused its settings."""
    train(*SAVE, "train.max_steps=1")
    before = files(job / "out")

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(SFTTrainer, method, fail)
    for options in ([OVERWRITE], ["train.output_dir=deep/new"]):
        with pytest.raises(RuntimeError, match="no"):
            train(*options)
    assert files(job / "out") == before
    assert not (job / "deep").exists(), "transformers makes the folder when the trainer is made"


def test_an_interrupted_run_is_not_written_over_either(job: Path):
    """A run killed before its first checkpoint has metrics only, and a second start emptied them without a word."""
    train("train.max_steps=2")
    out = job / "out"
    shutil.rmtree(out / "adapter")
    before = files(out)
    with pytest.raises(UserError) as caught:
        check()
    assert str(caught.value) == (
        f"job.yaml:13: train.output_dir {out} already holds a run (metrics.jsonl); replace it with "
        "train.overwrite=true, or name another folder"
    )
    assert files(out) == before
    assert "starting at the beginning" in train(RESUME, "train.max_steps=1")[0]
    assert logged_steps(out) == [1]


def test_a_run_that_failed_in_its_first_step_is_simply_started_again(job: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(SFTTrainer, "compute_loss", fail)
        train("train.max_steps=1")
    assert {path.name for path in (job / "out").iterdir()} == {"config.yaml", "metrics.jsonl"}
    train("train.max_steps=1")
    assert logged_steps(job / "out") == [1]


def test_without_a_checkpoint_a_finished_run_cannot_be_resumed(job: Path):
    train("train.max_steps=1")
    with pytest.raises(UserError, match=r"already holds a run \(adapter, metrics.jsonl\), without a checkpoint to re"):
        check(RESUME)


# Resuming.


@pytest.mark.parametrize("case", ["another rank", "broken checkpoints"])
def test_a_refused_resume_changes_nothing(job: Path, case: str):
    """config.yaml had the new settings before the checkpoint was looked at, and no longer told what was trained."""
    train(*SAVE, "train.max_steps=2")
    if case == "broken checkpoints":
        for file in (job / "out").glob("checkpoint-*/adapter_model.safetensors"):
            os.truncate(file, 100)
    before = files(job / "out")
    with pytest.raises(UserError):
        train(*SAVE, "train.max_steps=4", RESUME, "peft.r=8" if case == "another rank" else "train.seed=3")
    assert files(job / "out") == before


def test_a_resumed_run_notes_its_settings(job: Path):
    train(*SAVE, "train.max_steps=1")
    train(*SAVE, "train.max_steps=2", RESUME, OVERWRITE)
    noted = yaml.safe_load((job / "out" / "config.yaml").read_text())["train"]
    assert noted["max_steps"] == 2
    assert not {"resume", "overwrite"} & noted.keys(), "running config.yaml again would erase the run or go on with it"
    assert not list((job / "out").glob(".*"))


def test_a_finished_run_has_nothing_to_resume(job: Path, caplog: pytest.LogCaptureFixture):
    """Resumed at its last step, a run trained one step more where that was not an epoch's last, and saved the result.

    Eight rows in batches of four are two steps an epoch.
    """
    train(*SAVE, "train.max_steps=3")
    out = job / "out"
    before = files(out)
    train(*SAVE, "train.max_steps=3", RESUME)
    assert caplog.messages[-1] == "already at step 3 of 3; raise max_steps to go on"
    assert files(out) == before

    adapter = files(out / "adapter")
    shutil.rmtree(out / "adapter")  # as if it had been killed before it saved
    said = train(*SAVE, "train.max_steps=3", RESUME)
    assert f"saved {out / 'adapter'}" in said
    assert files(out / "adapter") == adapter
    train(*SAVE, "train.max_steps=-1", "train.num_train_epochs=1", RESUME)
    assert caplog.messages[-1] == "already at step 3 of 2; raise num_train_epochs to go on"


def test_a_finished_run_ends_with_its_best_checkpoint(job: Path, write_rows, rows):
    write_rows(job / "val.jsonl", rows[:2])
    best = ["train.load_best_model_at_end=true", "data.eval=val.jsonl", "train.eval_steps=1", "train.learning_rate=3"]
    train(*SAVE, *best)
    adapter = files(job / "out" / "adapter")
    shutil.rmtree(job / "out" / "adapter")
    train(*SAVE, *best, RESUME)
    assert files(job / "out" / "adapter") == adapter


class Spy(TrainerCallback):
    """Notes the intervals a run really used."""

    seen: dict[str, int] = {}

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.update(logging=state.logging_steps, save=state.save_steps, eval=state.eval_steps)


def test_resuming_uses_the_intervals_of_now(
    job: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """transformers went on with the checkpoint's logging_steps and printed a warning of four lines about it."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    make = sft_recipe.SFTTrainer

    def with_spy(*args, callbacks, **kwargs):
        return make(*args, callbacks=[*callbacks, Spy()], **kwargs)

    monkeypatch.setattr(sft_recipe, "SFTTrainer", with_spy)
    evaluate = ["data.eval=train.jsonl", "train.eval_steps=2"]
    train(*SAVE, *evaluate, "train.max_steps=2")
    assert Spy.seen == {"logging": 1, "save": 1, "eval": 2}
    train("train.save_strategy=steps", "train.save_steps=4", "data.eval=train.jsonl", "train.eval_steps=3",
          "train.max_steps=8", "train.logging_steps=2", "train.per_device_train_batch_size=2", RESUME)  # fmt: skip
    assert Spy.seen == {"logging": 2, "save": 4, "eval": 3}
    assert logged_steps(job / "out") == [1, 2, 4, 6, 8]
    told = [record.getMessage() for record in caplog.records]
    assert not [line for line in told if "do not match" in line]
    assert [line for line in told if line.startswith("resuming with per_device_train_batch_size 2 after 4;")]


# Where a folder cannot be.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "train.output_dir is empty; give it a folder for the run, such as runs/first"),
        ("' '", "train.output_dir is empty; give it a folder for the run, such as runs/first"),
        ("null", "train.output_dir is null; give it a folder for the run, such as runs/first"),
        ("~nobody-of-this-name/x", "train.output_dir ~nobody-of-this-name/x: it cannot be a folder: "),
        ("train.jsonl", "train.output_dir {job}/train.jsonl: it is a file, and a folder is needed"),
        ("train.jsonl/a/b", "train.output_dir {job}/train.jsonl/a/b: {job}/train.jsonl is a file, and a folder is"),
        ("x/" + "y" * 300, "train.output_dir {job}/x/" + "y" * 300 + ": it cannot be used: File name too long"),
        ("/proc/x", "train.output_dir /proc/x: "),
        ('"a\\0b"', "train.output_dir a\0b: it cannot be a folder: embedded null byte"),
    ],
    ids=["empty", "blank", "null", "no-home", "file", "parent-is-a-file", "long", "proc", "null-byte"],
)
def test_a_folder_that_cannot_be_is_refused_before_anything_is_loaded(
    job: Path, capsys: pytest.CaptureFixture[str], given: str, message: str
):
    """An empty one scattered the run over the current folder; the others ended in a traceback after loading."""
    text = (job / "job.yaml").read_text()
    (job / "job.yaml").write_text(text.replace("output_dir: out", f"output_dir: {given or repr('')}"))
    before = files(job)
    assert run("model.path=./absent") == 2
    error = capsys.readouterr().err
    if given in ("", "' '"):
        assert run("train.output_dir=''") == 2 and run("train.output_dir=") == 2
    assert error.startswith(f"error: job.yaml:13: {message.format(job=job)}") and error.count("\n") == 1
    assert files(job) == before
