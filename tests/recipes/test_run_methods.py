"""Every method from the command line: it trains, resumes to the bit, answers, and is merged or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fastpeft.cli import main
from fastpeft.errors import UserError
from fastpeft.recipes import load_config, load_for_generation, run_sft

METHODS = {
    "lora": "{method: lora, r: 4, target_modules: all-linear, use_dora: true}",
    "qlora": "{method: qlora, r: 4, target_modules: all-linear}",
    "ia3": "{method: ia3}",
    "prompt_tuning": "{method: prompt_tuning, num_virtual_tokens: 4, prompt_tuning_init: SAMPLE_VOCAB}",
    "p_tuning": "{method: p_tuning, num_virtual_tokens: 4, encoder_hidden_size: 16}",
    "adapter": "{method: adapter, adapter_type: houlsby}",
    "full": "{method: full, freeze: [embed_tokens], master_dtype: float32}",
    "none": "{method: none}",
}
MERGES = ("lora", "qlora", "ia3")
WHOLE = ("full", "none")
methods = pytest.mark.parametrize("name", list(METHODS))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        if file.parent.name in ("adapter", "model"):
            tensors.update(load_file(file))
    return tensors


def options(name: str, folder: str, steps: int) -> list[str]:
    rate = {"qlora": "1e-2", "full": "1e-3", "none": "1e-3"}.get(name, "3e-2")
    return [
        *(f"peft={METHODS[name]}", f"train.output_dir={folder}", f"train.max_steps={steps}"),
        *("train.save_strategy=steps", "train.save_steps=2", f"train.learning_rate={rate}"),
        *("train.lr_scheduler_type=constant", "train.per_device_train_batch_size=8"),
    ]


@methods
def test_from_yaml_to_answers(job: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sft", "job.yaml", *options(name, "whole", 4)) == 0
    assert losses(job / "whole")[-1] < losses(job / "whole")[0]
    assert run("sft", "job.yaml", *options(name, "half", 2)) == 0
    assert run("sft", "job.yaml", *options(name, "half", 4), "train.resume=true") == 0
    whole, half = weights(job / "whole"), weights(job / "half")
    assert whole and whole.keys() == half.keys()
    assert all(torch.equal(whole[key], half[key]) for key in whole), "resuming in mid-run is no interruption"
    assert (job / "whole/model").is_dir() == (name in WHOLE)
    capsys.readouterr()

    assert run("generate", "whole", "--prompt", "Add 1 and 2.", "--max-new-tokens", "4") == 0
    answer = capsys.readouterr().out
    again = load_config(job / "whole/config.yaml")
    assert again.peft.method == ("lora" if name == "qlora" else name)
    assert again.model.quantize == ("nf4" if name == "qlora" else "none")

    code = run("export", "whole", "merged")
    printed = capsys.readouterr()
    if name in (*MERGES, *WHOLE):
        assert code == 0, printed.err
        capsys.readouterr()
        merged = ["--model", "merged", "--dtype", "float32"]
        assert run("generate", *merged, "--prompt", "Add 1 and 2.", "--max-new-tokens", "4") == 0
        assert capsys.readouterr().out == answer
    else:
        assert code == 2 and "which no weight can express; use the adapter beside its base" in printed.err
    if name not in WHOLE:
        assert run("export", "whole", "alone", "--to", "adapter") == 0
        capsys.readouterr()
        quantize = ["--quantize", "nf4"] if name == "qlora" else []
        base = ["--model", again.model.path, "--dtype", "float32", "--adapter", "alone", *quantize]
        assert run("generate", *base, "--prompt", "Add 1 and 2.", "--max-new-tokens", "4") == 0
        assert capsys.readouterr().out == answer


def test_virtual_tokens_count_in_the_limit(job: Path) -> None:
    said: list[str] = []
    options = ["peft={method: prompt_tuning, num_virtual_tokens: 10}", "train.max_steps=1"]
    run_sft(load_config("job.yaml", options), said.append)
    assert any("(limit 54)" in line for line in said)
    with pytest.raises(UserError) as caught:
        run_sft(load_config("job.yaml", [*options, "data.max_length=16", "train.output_dir=other"]))
    assert str(caught.value) == (
        "override 'data.max_length=16': data.max_length is 16, and the 10 virtual tokens of peft.num_virtual_tokens "
        "leave 6 for the text; it needs 8 or more"
    )


def test_a_template_of_the_settings_is_that_of_generation(job: Path) -> None:
    run_sft(load_config("job.yaml", ["model.chat_template=none", "train.max_steps=1"]))
    _, tokenizer = load_for_generation(job / "out")
    assert tokenizer.chat_template is None
    assert run("export", "out", "merged") == 0
    exported = AutoTokenizer.from_pretrained(job / "merged")
    assert exported.chat_template is None, "another program would ask the model in a layout that it was not taught"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "{method: ia3, r: 8}",
            "job.yaml:6: unknown key 'r' in peft; it belongs to method lora",
        ),
        (
            "{method: prompt_tuning, num_virtual_token: 8}",
            "job.yaml:6: unknown key 'num_virtual_token' in peft; did you mean 'num_virtual_tokens'?",
        ),
        (
            "{method: p_tuning, prompt_tuning_init: TEXT}",
            "job.yaml:6: unknown key 'prompt_tuning_init' in peft; it belongs to method prompt_tuning",
        ),
        (
            "{method: adapter, encoder_hidden_size: 8}",
            "job.yaml:6: unknown key 'encoder_hidden_size' in peft; it belongs to method p_tuning",
        ),
        (
            "{method: adapter, adapter_type: housby}",
            "job.yaml:6: peft.adapter_type='housby'; must be one of 'houlsby', 'pfeiffer', 'parallel', "
            "'parallel_adapter', 'linear_adapter'; did you mean 'houlsby'?",
        ),
        (
            "{method: adapter, leave_out: [7]}",
            "job.yaml:6: peft.leave_out: there is no layer 7; the model's are 0 to 1",
        ),
        (
            "{method: ia3, target_modules: [k_porj]}",
            "job.yaml:6: peft.target_modules=['k_porj'] matches no module of the model; did you mean 'k_proj'",
        ),
        (
            "{method: full, freeze: [embed_tokns]}",
            "job.yaml:6: peft.freeze: 'embed_tokns' matches no parameter of the model; did you mean",
        ),
        (
            "{method: qlora, target_moduls: all-linear}",
            "job.yaml:6: unknown key 'target_moduls' in peft; did you mean 'target_modules'?",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line(job: Path, given: str, message: str) -> None:
    text = (job / "job.yaml").read_text()
    start, end = text.index("peft:"), text.index("data:")
    spread = given.strip("{}").split(", ", 1)
    (job / "job.yaml").write_text(f"{text[:start]}peft:\n  {spread[0]}\n  {spread[1]}\n{text[end:]}")
    with pytest.raises(UserError) as caught:
        run_sft(load_config("job.yaml"))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("peft", "model", "message"),
    [
        ("{method: qlora}", "none", "peft.method qlora is lora over a packed model, and model.quantize is none"),
        ("{method: full}", "nf4", "peft.method full trains all weights, and model.quantize nf4 freezes them"),
    ],
)
def test_methods_that_do_not_go_with_the_model(job: Path, peft: str, model: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("job.yaml", [f"peft={peft}", f"model.quantize={model}"])
    assert message in str(caught.value)
