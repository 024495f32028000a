"""Several adapters that answer beside each other, and the base with them."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fastpeft
from fastpeft.cli import main
from fastpeft.errors import UserError
from fastpeft.recipes import ModelConfig
from fastpeft.recipes.side_by_side import as_lines, load_side_by_side, table_printer

KINDS = {
    "lora": fastpeft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "ia3": fastpeft.IA3Config(),
    "virtual": fastpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "bottleneck": fastpeft.BottleneckAdapterConfig(),
}
LENGTH = ["--max-new-tokens", "6"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return 0 if left.value.code is None else int(left.value.code)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with an adapter of every kind, each far enough from nothing to say something of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        model = fastpeft.get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def base(model_folder: Path) -> list[str]:
    return ["--model", str(model_folder), "--dtype", "float32"]


def test_every_kind_answers_as_it_does_alone(
    adapters: Path, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """An adapter that stayed active in another's turn, or a base that was never switched to, changes an answer."""
    asked = [{"input": f"Add {n} and 1.", "id": n} for n in range(3)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    question = ["--input", str(tmp_path / "ask.jsonl"), *LENGTH, "--temperature", "1", "--batch-size", "2"]
    alone: dict[str, list[str]] = {}
    for name in ("untuned", *KINDS):
        way = ["--untuned"] if name == "untuned" else ["--adapter", str(adapters / name)]
        assert run("generate", *base, *way, *question) == 0
        alone[name] = [json.loads(line)["generated"] for line in capsys.readouterr().out.splitlines()]
    assert len({tuple(answers) for answers in alone.values()}) == len(alone), "the adapters say different things"

    several = [option for name in KINDS for option in ("--adapter", str(adapters / name))]
    assert run("generate", *base, *several, "--untuned", *question) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert [list(row["generated"]) for row in rows] == [["untuned", *KINDS]] * 3
    for name, answers in alone.items():
        assert [row["generated"][name] for row in rows] == answers, name


def test_labelled_lines(adapters: Path, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "ask.txt").write_text("Add 1 and 2.\nAdd 2 and 3.\n")
    several = ["--adapter", str(adapters / "lora"), "--adapter", str(adapters / "ia3")]
    assert run("generate", *base, *several, "--input", str(tmp_path / "ask.txt"), *LENGTH) == 0
    blocks = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert len(blocks) == 2
    for block in blocks:
        labels = [line.partition(":")[0] for line in block.splitlines() if not line.startswith("    ")]
        assert labels == ["lora", "ia3"]
    assert as_lines({"a": "one\ntwo", "b": ""}) == "a: one\n    two\nb: "


def test_a_table_on_a_terminal(
    adapters: Path, base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    assert run("generate", *base, "--adapter", str(adapters / "lora"), "--untuned", "--prompt", "Hi", *LENGTH) == 0
    shown = capsys.readouterr().out
    assert "Hi" in shown and "untuned" in shown and "lora" in shown and "━" in shown


def test_a_table_shows_answers_as_they_are(capsys: pytest.CaptureFixture[str]):
    table_printer(60)("which [b]?", {"a": "[red]x[/red]", "b": "y"})
    shown = capsys.readouterr().out
    assert "which [b]?" in shown and "[red]x[/red]" in shown


def test_a_chat_has_every_answer(
    adapters: Path, base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    typed = io.StringIO("Hi\n\n")
    monkeypatch.setattr(typed, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", typed)
    assert run("generate", *base, "--adapter", str(adapters / "lora"), "--untuned", *LENGTH) == 0
    shown = capsys.readouterr().out
    assert "untuned: " in shown and "\nlora: " in shown


def test_a_run_gives_the_base(job: Path, adapters: Path, capsys: pytest.CaptureFixture[str]):
    assert run("sft", "job.yaml", "train.max_steps=1") == 0
    capsys.readouterr()
    several = ["--adapter", "out/adapter", "--adapter", str(adapters / "lora"), "--untuned"]
    assert run("generate", "out", *several, "--prompt", "Hi", *LENGTH) == 0
    shown = capsys.readouterr().out
    assert "untuned: " in shown and "\nadapter: " in shown and "\nlora: " in shown


def test_equal_names_of_folders(adapters: Path, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for parent in ("a", "b"):
        shutil.copytree(adapters / "lora", tmp_path / parent / "adapter")
    several = [option for parent in "ab" for option in ("--adapter", str(tmp_path / parent / "adapter"))]
    assert run("generate", *base, *several, "--prompt", "Hi", "--temperature", "1", *LENGTH) == 0
    first, _, second = capsys.readouterr().out.rstrip("\n").removeprefix("a/adapter: ").partition("\nb/adapter: ")
    assert first == second, "one adapter, the same draws"


def test_complaints(adapters: Path, model_folder: Path, tmp_path: Path):
    model = ModelConfig(str(model_folder), dtype="float32")
    with pytest.raises(UserError, match=r"generate: the adapter .*lora is given twice"):
        load_side_by_side(model=model, adapters=[adapters / "lora", adapters / "ia3" / ".." / "lora"])
    with pytest.raises(UserError, match="no adapter was given to answer side by side"):
        load_side_by_side(model=model, adapters=[], untuned=True)
    with pytest.raises(UserError, match=r"is not an adapter folder: there is no adapter_config\.json in it"):
        load_side_by_side(model=model, adapters=[adapters / "lora", tmp_path])
    with pytest.raises(UserError, match="give either a run folder or a base model"):
        load_side_by_side(adapters=[adapters / "lora", adapters / "ia3"])
    with pytest.raises(UserError, match="give either a run folder or a base model"):
        load_side_by_side(tmp_path, model=model, adapters=[adapters / "lora", adapters / "ia3"])


def test_an_adapter_of_another_base_is_refused(adapters: Path, model_folder: Path, tmp_path: Path):
    model = ModelConfig(str(model_folder), dtype="float32")
    config = AutoModelForCausalLM.from_pretrained(model_folder).config
    config.hidden_size = 128
    fastpeft.get_peft_model(AutoModelForCausalLM.from_config(config), KINDS["lora"]).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"(?s)wide.*the adapter belongs to a base model of other sizes"):
        load_side_by_side(model=model, adapters=[adapters / "lora", tmp_path / "wide"])


def test_an_adapter_that_changes_the_base_stands_alone(adapters: Path, model_folder: Path, tmp_path: Path):
    """Its embeddings would have answered for the other adapters, and for the base, as well."""
    model = ModelConfig(str(model_folder), dtype="float32")
    folder = tmp_path / "resized"
    shutil.copytree(adapters / "lora", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    embedding = AutoModelForCausalLM.from_pretrained(model_folder).get_input_embeddings().weight
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros_like(embedding)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for others, untuned in (([adapters / "ia3"], False), ([], True)):
        with pytest.raises(UserError, match="resized changes weights of the base model itself"):
            load_side_by_side(model=model, adapters=[*others, folder], untuned=untuned)
