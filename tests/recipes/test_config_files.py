"""``fastpeft config``: the schema says what the check says, and the files to begin with load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpeft.cli import main
from fastpeft.errors import UserError
from fastpeft.recipes import json_schema, load_config, starting_file
from fastpeft.recipes.peft_section import METHODS

STARTS = ["lora", "qlora", "ia3", "prompt_tuning", "p_tuning", "adapter", "full", "none", "reward", "dpo", "ppo"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def _uncommented(text: str) -> str:
    """The file with every option in it that is commented out, but those that exclude others."""
    lines = []
    for line in text.splitlines():
        bare = line.lstrip()
        option = bare.removeprefix("# ").split(": ", 1)[0]
        excluded = ("in place", "fastpeft", "adapter", "gguf_file", "resume", "overwrite", "feedforward", "train")
        if bare.startswith("# ") and not option.startswith(excluded):
            line = line.replace("# ", "", 1)
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("what", STARTS)
def test_a_file_to_begin_with_loads(job: Path, model_folder: Path, what: str) -> None:
    (job / "data").mkdir()
    for name in ("train", "validation", "pairs", "pairs_validation", "prompts"):
        (job / f"data/{name}.jsonl").write_text("{}\n")
    (job / "rules.py").write_text("")
    kind = what if what in ("reward", "dpo", "ppo") else "sft"
    text = starting_file(what).replace("models/my-model", str(model_folder))
    (job / "start.yaml").write_text(text)
    config = load_config("start.yaml", kind=kind)
    assert config.peft.method == ("lora" if kind != "sft" or what == "qlora" else what)
    (job / "all.yaml").write_text(_uncommented(text))
    assert load_config("all.yaml", kind=kind).kind == kind, "what is commented out is right too"


def test_a_file_is_written_and_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.yaml"
    assert run("config", "init", "qlora", str(out)) == 0
    assert out.read_text() == starting_file("qlora")
    assert run("config", "init", "lora", str(out)) == 2
    assert "is there already; name another file" in capsys.readouterr().err
    assert out.read_text() == starting_file("qlora")
    assert run("config", "init", "loar") == 2
    assert "'loar' is none of lora, qlora" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "ppo"])
def test_the_schema_knows_every_key(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "schema", "--kind", kind) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json_schema(kind)
    sections = schema["properties"]
    assert ("reward" in sections) == (kind == "ppo")
    assert {one["title"] for one in sections["peft"]["oneOf"]} == {*METHODS, "none"}
    assert sections["train"]["properties"]["learning_rate"]["type"] == "number"
    assert sections["train"]["properties"]["max_steps"]["description"]
    assert sections["model"]["properties"]["quantize"]["enum"] == ["nf4", "none"]
    assert "Jinja template" in sections["model"]["properties"]["chat_template"]["description"]
    for name in yaml.safe_load(starting_file("lora" if kind == "sft" else kind))["train"]:
        assert name in sections["train"]["properties"]


def test_the_schema_and_the_check_agree_on_types() -> None:
    lora = next(one for one in json_schema()["properties"]["peft"]["oneOf"] if one["title"] == "lora")
    properties: dict[str, Any] = lora["properties"]
    assert properties["r"] == {"type": "integer", "description": "rank of the update.", "default": 8}
    assert properties["target_modules"]["anyOf"] == [
        {"type": "array", "items": {"type": "string"}},
        {"type": "string"},
        {"type": "null"},
    ]
    assert properties["rank_pattern"]["additionalProperties"] == {"type": "integer"}
    with pytest.raises(UserError, match="--kind is 'stf'; it must be one of sft, reward, dpo, ppo; did you mean 'sft'"):
        json_schema("stf")


@pytest.mark.parametrize("command", ["sft", "finetune"])
def test_a_dry_run_prints_what_the_file_comes_to(
    job: Path, model_folder: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (job / "nemo.yaml").write_text(
        f"trainer: {{max_steps: 2, accelerator: gpu}}\nexp_manager: {{explicit_log_dir: out}}\n"
        f"model: {{restore_from_path: {model_folder}, data: {{train_ds: {{file_path: train.jsonl}}}}}}\n"
    )
    file = "job.yaml" if command == "sft" else "nemo.yaml"
    assert run(command, file, "--dry-run") == 0
    said = capsys.readouterr().out
    (job / "resolved.yaml").write_text(said)
    config = load_config("resolved.yaml")
    assert config.data.train == job / "train.jsonl" and config.output_dir == job / "out"
    assert not (job / "out").exists(), "nothing ran"
    assert ("without effect here: trainer.accelerator" in said) == (command == "finetune")
