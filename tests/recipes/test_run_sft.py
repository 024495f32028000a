"""``fastpeft sft`` and ``fastpeft generate`` from end to end on a tiny model, and every mistake on the way."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fastpeft.cli import main
from fastpeft.errors import UserError
from fastpeft.recipes import ModelConfig, converse, generate_answers, load_config, load_for_generation, run_sft
from fastpeft.trainers import SFTTrainer


def run(*arguments: str) -> int:
    """Exit code of ``fastpeft ...`` in this process."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    code = left.value.code
    return 0 if code is None else int(code)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_accelerated_run_learns_the_same(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for name, options in (("a", []), ("b", ["model.accelerate=true", "model.checkpointing=full"])):
        assert run("sft", "job.yaml", f"train.output_dir={name}", "model.dtype=float32", *options) == 0
        found.append([row["loss"] for row in metrics(job / name) if "loss" in row])
        assert ("2 layer, 1 loss" in capsys.readouterr().out) == bool(options)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_a_run_on_a_gpu_tells_what_was_predicted_and_measured(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """On a GPU that is made up; on a CPU nothing is said."""
    options = [f"peft.method={method}", *(["peft.num_virtual_tokens=4"] if method == "prompt_tuning" else [])]
    text = (job / "job.yaml").read_text()
    (job / "plain.yaml").write_text(text.replace("  r: 4\n  lora_alpha: 8\n  target_modules: all-linear\n", ""))
    assert run("sft", "plain.yaml", *options, "train.output_dir=cpu") == 0
    assert "measured" not in capsys.readouterr().out
    assert not any("measured_memory_bytes" in row for row in metrics(job / "cpu"))

    monkeypatch.setattr(SFTTrainer, "peak_memory", lambda trainer: 123_000_000)
    assert run("sft", "plain.yaml", *options, "train.output_dir=gpu") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: predicted")]
    last = metrics(job / "gpu")[-1]
    assert last["step"] == 3 and last["measured_memory_bytes"] == 123_000_000
    predicted = last["predicted_memory_bytes"]
    change = 100 * 123_000_000 / predicted - 100
    assert f"predicted {predicted / 1e9:.2f} GB, measured 0.12 GB ({change:+.1f}%), for 4 rows of " in line
    tokens = int(line.split(" rows of ")[1].split()[0])
    assert tokens % 8 == (4 if method == "prompt_tuning" else 0), "the padded batch, and the virtual tokens"
    assert run("estimate", "gpu") == 0
    assert "measured " in capsys.readouterr().out, "of a run folder as of its config.yaml"


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_from_yaml_to_answers(
    job: Path, rows: list[dict[str, str]], write_rows, capsys: pytest.CaptureFixture[str], quantize: str
):
    write_rows(job / "val.jsonl", rows[:2])
    options = [f"model.quantize={quantize}", "data.eval=val.jsonl", "train.save_strategy=steps", "train.save_steps=2"]
    assert run("sft", "job.yaml", *options) == 0
    out = job / "out"
    assert {path.name for path in out.iterdir()} >= {
        "adapter",
        "checkpoint-2",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
    }
    assert not list(out.glob(".*")), "no partial folders are left"
    losses = [row["loss"] for row in metrics(out) if "loss" in row]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert any("eval_loss" in row for row in metrics(out))
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["quantize"] == quantize
    assert "train.jsonl: 8 of 8 rows" in capsys.readouterr().out

    write_rows(job / "ask.jsonl", [{"input": rows[0]["input"], "id": 7}, rows[1]])
    assert run("generate", "out", "--input", "ask.jsonl", "--max-new-tokens", "4") == 0
    answered = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["input"] for row in answered] == [rows[0]["input"], rows[1]["input"]]
    assert answered[0]["id"] == 7 and all("generated" in row for row in answered)
    assert run("generate", "out", "--prompt", rows[0]["input"], "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out.strip() == answered[0]["generated"]


def test_learning_the_rows_by_heart(job: Path, rows: list[dict[str, str]]):
    """Prompts in generation have to be those of training, or a model that knows the rows would not give the answers."""
    overrides = ["train.max_steps=150", "train.learning_rate=1e-2", "peft.r=16", "train.logging_steps=50"]
    run_sft(load_config("job.yaml", [*overrides, "train.per_device_train_batch_size=8"]))
    model, tokenizer = load_for_generation(job / "out")
    prompts = [row["input"] for row in rows]
    for batch_size in (1, 8):
        answers = list(generate_answers(model, tokenizer, prompts, max_new_tokens=32, batch_size=batch_size))
        assert answers == [row["output"] for row in rows]
    untuned, _ = load_for_generation(job / "out", untuned=True)
    assert list(generate_answers(untuned, tokenizer, prompts, max_new_tokens=8)) != answers


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(job: Path):
    save = [
        "train.save_strategy=steps",
        "train.save_steps=2",
        "peft.lora_dropout=0.1",
        "train.lr_scheduler_type=constant",
    ]
    run_sft(load_config("job.yaml", [*save, "train.max_steps=4", "train.output_dir=whole"]))
    run_sft(load_config("job.yaml", [*save, "train.max_steps=2", "train.output_dir=half"]))
    resumed = load_config("job.yaml", [*save, "train.max_steps=4", "train.output_dir=half", "train.resume=true"])
    run_sft(resumed)
    whole, half = (load_file(job / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    for name in whole:
        assert torch.equal(whole[name], half[name]), name
    assert [row["step"] for row in metrics(job / "half") if "loss" in row] == [1, 2, 3, 4]


def test_resume_without_a_checkpoint_starts_at_the_beginning(job: Path):
    said: list[str] = []
    run_sft(load_config("job.yaml", ["train.resume=true", "train.max_steps=1"]), said.append)
    assert said[0] == f"no checkpoint in {job / 'out'} to resume from; starting at the beginning"


def test_a_run_is_not_written_over_another(job: Path, capsys: pytest.CaptureFixture[str]):
    assert run("sft", "job.yaml", "train.max_steps=1") == 0
    before = (job / "out" / "config.yaml").read_text()
    capsys.readouterr()
    assert run("sft", "job.yaml", "train.max_steps=2") == 2
    assert capsys.readouterr().err == (
        f"error: job.yaml:13: train.output_dir {job / 'out'} already holds a run (adapter, metrics.jsonl); replace it "
        "with train.overwrite=true, or name another folder\n"
    )
    assert (job / "out" / "config.yaml").read_text() == before
    assert run("sft", "job.yaml", "train.max_steps=2", "train.overwrite=true") == 0
    assert [row["step"] for row in metrics(job / "out") if "loss" in row] == [1, 2]


def test_all_weights(job: Path):
    out = run_sft(load_config("job.yaml", ["peft.method=none", "train.max_steps=1"]))
    assert (out / "model" / "model.safetensors").exists() and not (out / "adapter").exists()
    model, tokenizer = load_for_generation(out)
    assert len(list(generate_answers(model, tokenizer, ["Add 1 and 2."], max_new_tokens=2))) == 1


def test_the_first_values_of_the_adapter_follow_the_seed(job: Path):
    def adapter(name: str, seed: int) -> dict[str, torch.Tensor]:
        options = ["train.max_steps=1", f"train.seed={seed}", f"train.output_dir={name}"]
        torch.manual_seed(hash(name) % 1000)
        return load_file(run_sft(load_config("job.yaml", options)) / "adapter" / "adapter_model.safetensors")

    first, again, other = adapter("a", 1), adapter("b", 1), adapter("c", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing file", "data.train: there is no file absent.jsonl in the current folder or beside job.yaml"),
        ("malformed line", "train.jsonl:3: not valid JSON"),
        ("missing field", "train.jsonl:2: no key 'output'; found 'input', 'ouput'; did you mean 'output'"),
        ("empty data", "train.jsonl: it is empty"),
        ("no weights", "has no weights; it needs model.safetensors"),
        ("no folder", "model.path: there is no folder ./nowhere"),
        ("unknown key", "job.yaml:6: unknown key 'rnak_pattern' in peft; did you mean 'rank_pattern'?"),
        ("bad target", "peft.target_modules=['q_porj'] matches no module of the model; did you mean 'q_proj'"),
        ("bad override", "override 'train.max_stepz=1': unknown key 'max_stepz' in train; did you mean 'max_steps'?"),
        ("output is a file", "train.output_dir"),
    ],
)
def test_a_mistake_gets_one_message_and_leaves_nothing_behind(
    job: Path, rows, write_rows, model_folder: Path, capsys: pytest.CaptureFixture[str], case: str, message: str
):
    overrides = []
    if case == "missing file":
        overrides = ["data.train=absent.jsonl"]
    elif case == "malformed line":
        lines = (job / "train.jsonl").read_text().splitlines()
        (job / "train.jsonl").write_text("\n".join([*lines[:2], lines[2][:-4], *lines[3:]]))
    elif case == "missing field":
        write_rows(job / "train.jsonl", [rows[0], {"input": "a", "ouput": "b"}, rows[1]])
    elif case == "empty data":
        write_rows(job / "train.jsonl", [])
    elif case == "no weights":
        folder = Path(shutil.copytree(model_folder, job / "copy"))
        (folder / "model.safetensors").unlink()
        overrides = ["model.path=copy"]
    elif case == "no folder":
        overrides = ["model.path=./nowhere"]
    elif case == "unknown key":
        text = (job / "job.yaml").read_text()
        (job / "job.yaml").write_text(text.replace("  r: 4", "  rnak_pattern: {}"))
    elif case == "bad target":
        overrides = ["peft.target_modules=[q_porj]"]
    elif case == "bad override":
        overrides = ["train.max_stepz=1"]
    elif case == "output is a file":
        (job / "out").write_text("mine")
    before = sorted(path.name for path in job.iterdir())
    assert run("sft", "job.yaml", *overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert "Traceback" not in error and error.count("error:") == 1
    assert sorted(path.name for path in job.iterdir()) == before


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("path: ./absent", "job.yaml:2: model.path: there is no folder ./absent"),
        ("path: bare", "job.yaml:2: model.path {job}/bare: the folder {job}/bare has no config.json"),
        ("path: no_weights", "job.yaml:2: model.path {job}/no_weights: the folder {job}/no_weights has no weights"),
        ("path: good\n  gguf_file: a.gguf", "job.yaml:3: model.gguf_file: there is no a.gguf in {job}/good"),
        (
            "path: good\n  quantize: nf4\n  skip_modules: [q_porj]",
            "job.yaml:4: model.skip_modules names 'q_porj', which matches no module",
        ),
    ],
    ids=["no-folder", "no-model", "no-weights", "no-gguf", "no-such-module"],
)
def test_complaints_about_the_model_name_the_line(
    job: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], written: str, message: str
):
    (job / "bare").mkdir()
    shutil.copytree(model_folder, job / "good")
    shutil.copytree(model_folder, job / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    text = (job / "job.yaml").read_text()
    (job / "job.yaml").write_text(text.replace(f"path: {model_folder}", written))
    assert run("sft", "job.yaml") == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(job=job)}")


def test_generate_complaints(job: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]):
    def complaint(*arguments: str) -> str:
        assert run("generate", *arguments) == 2
        return capsys.readouterr().err

    assert complaint("--prompt", "x") == "error: generate: give either a run folder or a base model (--model)\n"
    assert complaint("absent", "--prompt", "x") == (
        "error: generate: absent is not a run folder: there is no config.yaml in it\n"
    )
    assert "command line: model.quantize is 'nf5' (text); it takes nf4, none" in complaint(
        "--model", str(model_folder), "--quantize", "nf5", "--prompt", "x"
    )
    assert "--max-new-tokens" in complaint("--model", str(model_folder), "--prompt", "x", "--max-new-tokens", "0")
    (job / "p.jsonl").write_text('{"input": "a"}\n[1]\n')
    assert complaint("--model", str(model_folder), "--input", "p.jsonl") == (
        "error: p.jsonl:2: the line is a list; it must be an object with one of the keys 'input', 'prompt', "
        "'instruction', 'messages' or 'conversations'\n"
    )
    (job / "p.txt").write_text("\n\n")
    assert "p.txt holds no prompt" in complaint("--model", str(model_folder), "--input", "p.txt")
    run_folder = job / "begun"
    (run_folder / "checkpoint-10").mkdir(parents=True)
    (run_folder / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(model_folder)}}))
    assert complaint("begun", "--prompt", "x") == (
        "error: generate: begun has no adapter yet; it has checkpoint-10: give --adapter begun/checkpoint-10\n"
    )
    with pytest.raises(UserError, match="is not an adapter folder"):
        load_for_generation(run_folder, adapter=run_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["out", "--quantize", "nf4"],
            "--quantize cannot go with a run, whose config.yaml says how its model is loaded",
        ),
        (["out", "--dtype", "float32", "--gguf-file", "x.gguf"], "--gguf-file, --dtype cannot go with a run"),
        (["out", "--input", "ask.jsonl"], "--prompt and --input exclude each other; give one of them"),
    ],
)
def test_options_that_would_take_no_effect_are_refused(
    job: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    """They were passed over in silence: a run asked for with --quantize nf4 answered from its unquantised model."""
    assert run("generate", *arguments, "--prompt", "x") == 2
    assert capsys.readouterr().err.startswith(f"error: generate: {message}")


def test_prompts_are_read_as_training_rows_are(
    job: Path, rows: list[dict[str, str]], model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    """Files with a byte order mark, as Windows writes them, trained, and were refused as prompts."""
    short = ["--model", str(model_folder), "--max-new-tokens", "1"]
    (job / "ask.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8-sig")
    (job / "ask.txt").write_text(rows[0]["input"] + "\n", encoding="utf-8-sig")
    assert run("generate", *short, "--input", "ask.jsonl") == 0
    answer = json.loads(capsys.readouterr().out)["generated"]
    assert run("generate", *short, "--input", "ask.txt") == 0
    assert capsys.readouterr().out.strip() == answer


def test_a_bad_prompt_in_memory_is_named_by_its_number(job: Path, model_folder: Path):
    model, tokenizer = load_for_generation(model=ModelConfig(str(model_folder)))
    with pytest.raises(UserError) as caught:
        generate_answers(model, tokenizer, ["good", {"inptu": "a"}])
    assert str(caught.value).startswith(
        "generate: prompt 2: no key 'input', 'prompt', 'instruction', 'messages' or 'conversations'; found 'inptu'; did"
    )


def test_rows_with_columns_of_their_own(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on, checked, and generated from, by the run's templates; texts on the command line are whole prompts."""
    rows = [{"context": f"There are {n} cups.", "question": "How many?", "answer": f"{n} cups"} for n in range(8)]
    (job / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ['data.prompt_template="{context} {question}"', 'data.answer_template="{answer}"']
    assert run("check", "job.yaml", *options) == 0
    assert run("sft", "job.yaml", *options) == 0
    assert "form: template" in capsys.readouterr().out
    assert run("generate", "out", "--input", "train.jsonl", "--max-new-tokens", "2") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in told] == rows
    assert run("generate", "out", "--prompt", "There are 0 cups. How many?", "--max-new-tokens", "2") == 0
    assert capsys.readouterr().out.strip() == told[0]["generated"]
    assert run("generate", "out", "--input", "job.yaml", "--max-new-tokens", "1") == 0, "lines of text are prompts"
    assert run("sft", "job.yaml", "train.overwrite=true") == 2, "without templates the rows are of no form"


def test_control_c_saves_and_is_code_130(
    job: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    """Ctrl-C in the 80 steps before the first save_steps left nothing behind and said nothing."""
    from fastpeft.trainers import SFTTrainer

    step = SFTTrainer.training_step

    def interrupted(self, *arguments, **keywords):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "training_step", interrupted)
        assert run("sft", "job.yaml") == 130
    assert "Traceback" not in capsys.readouterr().err
    assert f"saved {job / 'out' / 'checkpoint-2'}; to go on from there, run again with train.resume=true" in caplog.text
    assert run("sft", "job.yaml", "train.resume=true") == 0
    assert [row["step"] for row in metrics(job / "out") if "loss" in row] == [1, 2, 3]


def test_a_run_shorter_than_logging_steps_has_a_loss_to_plot(job: Path):
    """With the default logging_steps of 10 a run of 3 steps ended without a loss: 'holds no loss yet'."""
    out = run_sft(load_config("job.yaml", ["train.logging_steps=10"]))
    assert [row["step"] for row in metrics(out) if "loss" in row] == [3]
    assert (out / "loss.png").exists()


def test_a_broken_adapter_is_refused(job: Path, capsys: pytest.CaptureFixture[str]):
    run_sft(load_config("job.yaml", ["train.max_steps=1"]))
    file = job / "out" / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    name = next(iter(whole))
    for damaged in ({**whole, name: whole[name] * torch.nan}, {k: v for k, v in whole.items() if k != name}):
        save_file(damaged, file)
        capsys.readouterr()
        assert run("generate", "out", "--prompt", "x") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "out/adapter" in error and "Traceback" not in error


def test_training_without_a_logged_loss_still_ends_well(job: Path):
    said: list[str] = []
    run_sft(load_config("job.yaml", ["train.max_steps=1", "train.logging_strategy=no"]), said.append)
    assert said[-2] == f"saved {job / 'out' / 'adapter'}"
    assert said[-1].startswith("no loss curve: plot: ")


def test_generate_reads_lines_from_standard_input(
    job: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert run("generate", "--model", str(model_folder), "--max-new-tokens", "1") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert run("generate", "--model", str(model_folder)) == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_on_a_terminal_turns_follow_one_another(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nthree\n"))
    converse(str.upper)
    assert capsys.readouterr().out == "One prompt a line; an empty line ends.\n> ONE\n> TWO\n> "


def test_sampling_follows_the_seed(job: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]):
    def sampled(seed: int) -> str:
        options = ["--temperature", "1", "--max-new-tokens", "16", "--seed", str(seed)]
        assert run("generate", "--model", str(model_folder), "--prompt", "Add", *options) == 0
        return capsys.readouterr().out

    assert sampled(1) == sampled(1) != sampled(2)
