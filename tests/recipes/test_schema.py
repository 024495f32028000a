"""The sections of a run's YAML: what they accept, and one message for each way to get them wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastpeft.errors import UserError
from fastpeft.methods import LoraConfig
from fastpeft.recipes import load_config


def test_a_whole_file(job: Path):
    config = load_config("job.yaml", ["train.learning_rate=1e-3", "peft.target_modules=[q_proj, v_proj]"])
    assert config.model.quantize == "none" and config.model.block_size == 64
    assert isinstance(config.peft.config, LoraConfig)
    assert (config.peft.config.r, config.peft.config.target_modules) == (4, ["q_proj", "v_proj"])
    assert config.data.train == job / "train.jsonl" and config.data.max_length == 64
    assert config.train.args.learning_rate == 1e-3
    assert config.train.args.save_strategy == "no"
    assert config.train.args.max_length == 64, "the trainer sees the section data too"
    assert config.output_dir == job / "out"
    assert not config.output_dir.exists(), "reading a configuration writes nothing"


def test_the_resolved_file_means_the_same_from_anywhere(job: Path, monkeypatch: pytest.MonkeyPatch):
    first = load_config("job.yaml", ["train.warmup_steps=2", "model.quantize=nf4"])
    elsewhere = job / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text(first.to_yaml(), encoding="utf-8")
    monkeypatch.chdir("/")
    second = load_config(elsewhere / "config.yaml")
    assert (second.model, second.peft, second.data) == (first.model, first.peft, first.data)
    assert second.output_dir == first.output_dir and second.train.args.warmup_steps == 2
    assert yaml.safe_load(second.to_yaml()) == yaml.safe_load(first.to_yaml())


def test_paths_are_taken_from_the_current_folder_then_from_the_files(job: Path, monkeypatch: pytest.MonkeyPatch):
    (job / "sub").mkdir()
    monkeypatch.chdir(job / "sub")
    assert load_config("../job.yaml").data.train == job / "train.jsonl"
    (job / "sub" / "train.jsonl").write_text("{}")
    assert load_config("../job.yaml").data.train == job / "sub" / "train.jsonl"


def test_whole_numbers_may_be_written_as_powers_of_ten(job: Path):
    assert load_config("job.yaml", ["train.max_steps=1e3"]).train.args.max_steps == 1000


def test_an_evaluation_file_is_used(job: Path):
    assert load_config("job.yaml", ["data.eval=train.jsonl"]).train.args.eval_strategy == "epoch"
    assert load_config("job.yaml", ["data.eval=train.jsonl", "train.eval_steps=5"]).train.args.eval_strategy == "steps"
    assert load_config("job.yaml", ["data.eval=train.jsonl", "train.eval_strategy=no"]).train.args.eval_strategy == "no"


@pytest.mark.parametrize(
    ("written", "replacement", "message"),
    [
        ("lora_alpha:", "lora_alhpa:", "job.yaml:7: unknown key 'lora_alhpa' in peft; did you mean 'lora_alpha'?"),
        ("max_steps:", "max_step:", "job.yaml:14: unknown key 'max_step' in train; did you mean 'max_steps'?"),
        ("model:", "modle:", "job.yaml:1: unknown key 'modle' at the top level; did you mean 'model'?"),
        ("  seed: 7", "  max_length: 7", "job.yaml:21: unknown key 'max_length' in train; it belongs in data"),
        (
            "  max_length:",
            "  zzz:",
            "job.yaml:11: unknown key 'zzz' in data; "
            "the keys are train, eval, eval_fraction, cache_dir, prompt_template, answer_template, max_length, "
            "on_bad_row",
        ),
        (
            "dtype: float32",
            "activation_budget_gb: -3",
            "job.yaml:3: model.activation_budget_gb is -3 with checkpointing='selective'; a budget is a number "
            "of gigabytes above 0, for checkpointing='selective'",
        ),
        (
            "dtype: float32",
            "accelerate: false\n  checkpointing: full",
            "job.yaml:4: model.checkpointing is about fused layers, and model.accelerate is false; set it to true",
        ),
        (
            "  max_length:",
            "  prompt_template: '{q}'\n  max_length:",
            'job.yaml:11: data.prompt_template needs data.answer_template beside it, such as "{answer}"',
        ),
        (
            "  max_length:",
            "  prompt_template: Hi\n  answer_template: '{a}'\n  max_length:",
            "job.yaml:11: data: the template of the prompt is 'Hi'; it needs a field of a row, such as {prompt}",
        ),
        ("r: 4", "r: four", "job.yaml:6: peft.r is 'four' (text); it takes a whole number"),
        ("r: 4", "r: true", "job.yaml:6: peft.r is true; it takes a whole number"),
        ("r: 4", "r: 4.5", "job.yaml:6: peft.r is 4.5; it takes a whole number"),
        ("r: 4", "r: 0", "job.yaml:6: peft.r=0; a rank must be a whole number of at least 1"),
        ("r: 4", "r:", "job.yaml:6: peft.r is null; it takes a whole number"),
        (
            "dtype: float32",
            "dtype: bfloat",
            "job.yaml:3: model.dtype is 'bfloat' (text); it takes auto, bfloat16, float32, float16; "
            "did you mean 'bfloat16'?",
        ),
        (
            "learning_rate: 2e-3",
            "learning_rate: '2e-3'",
            "job.yaml:15: train.learning_rate is '2e-3' (text); it takes a number",
        ),
        ("use_cpu: true", "use_cpu: yes", "job.yaml:20: train.use_cpu is 'yes' (text); it takes true or false"),
        (
            "target_modules: all-linear",
            "target_modules: {a: 1}",
            "job.yaml:8: peft.target_modules is {'a': 1} (a mapping); it takes a list of text or text or null",
        ),
        ("  train: train.jsonl\n", "", "job.yaml:9: data.train is missing; give it a JSONL file"),
        (
            "  output_dir: out\n",
            "",
            "job.yaml:12: train.output_dir is missing; give it a folder for the run, such as runs/first",
        ),
        (
            "train: train.jsonl",
            "train: trian.jsonl",
            "job.yaml:10: data.train: there is no file trian.jsonl in the current folder or beside job.yaml",
        ),
        ("train: train.jsonl", "train: .", "job.yaml:10: data.train: . is a folder; give a JSONL file"),
        (
            "method: lora",
            "method: lroa",
            "job.yaml:5: peft.method is 'lroa' (text); it takes lora, qlora, ia3, prompt_tuning, p_tuning, "
            "adapter, full, none; did you mean 'lora'?",
        ),
        (
            "method: lora",
            "bias: some",
            "job.yaml:5: peft.bias='some'; must be one of 'none', 'all', 'lora_only'",
        ),
        (
            "save_strategy: no",
            "save_strategy: sometimes",
            "job.yaml:18: train.save_strategy: sometimes is not a valid SaveStrategy, please select one of "
            "['no', 'steps', 'epoch', 'best']",
        ),
        (
            "save_strategy: no",
            "eval_strategy: steps",
            "job.yaml:18: train.eval_strategy is 'steps', and there is nothing to evaluate on; "
            "give data.eval a JSONL file, or data.eval_fraction a share of the rows",
        ),
        (
            "  max_length: 64",
            "  max_length: 2",
            "job.yaml:11: data.max_length is 2; it must be 8 tokens or more",
        ),
        (
            "learning_rate: 2e-3",
            "learning_rate: -1",
            "job.yaml:15: train.learning_rate is -1; it must be 0 or more",
        ),
        (
            "max_steps: 3",
            "num_train_epochs: 0",
            "job.yaml:14: train.num_train_epochs is 0; it must be above 0, or max_steps 1 or more",
        ),
        (
            "max_steps: 3",
            "lr_scheduler_type: cosin",
            "job.yaml:14: train.lr_scheduler_type is 'cosin'; it must be one of linear, cosine, cosine_with_restarts, "
            "polynomial, constant, constant_with_warmup, inverse_sqrt, reduce_lr_on_plateau, cosine_with_min_lr, "
            "cosine_warmup_with_min_lr, warmup_stable_decay, greedy; did you mean 'cosine'?",
        ),
        (
            "max_steps: 3",
            "lr_scheduler_kwargs: {num_cyles: 2}",
            "job.yaml:14: train.lr_scheduler_kwargs is {'num_cyles': 2}; the schedule 'cosine' cannot be made with it: "
            "got an unexpected keyword argument 'num_cyles'",
        ),
        (
            "report_to: none",
            "report_to: tensorbord",
            "job.yaml:19: train.report_to is ['tensorbord']; it takes none, all, or some of azure_ml, clearml, "
            "codecarbon, comet_ml, dagshub, dvclive, flyte, kubeflow, mlflow, neptune, swanlab, tensorboard, trackio, "
            "wandb; did you mean 'tensorboard'?",
        ),
        (
            "seed: 7",
            "fp16: true",
            "job.yaml:21: train.fp16 is True; it needs a GPU and would do nothing on a CPU; leave it out, or use bf16",
        ),
        (
            "model:",
            "max_steps: 3\nmodel:",
            "job.yaml:1: unknown key 'max_steps' at the top level; did you mean train.max_steps?",
        ),
        (
            "model:",
            "lora_alhpa: 3\nmodel:",
            "job.yaml:1: unknown key 'lora_alhpa' at the top level; did you mean peft.lora_alpha?",
        ),
        (
            "model:",
            "zzz: 3\nmodel:",
            "job.yaml:1: unknown key 'zzz' at the top level; the keys are model, peft, data, train",
        ),
        ("peft:\n  method: lora\n", "peft:\n", None),
    ],
)
def test_one_message_with_the_line(job: Path, written: str, replacement: str, message: str | None):
    text = (job / "job.yaml").read_text()
    assert written in text
    (job / "job.yaml").write_text(text.replace(written, replacement, 1))
    if message is None:
        assert load_config("job.yaml").peft.method == "lora"
        return
    with pytest.raises(UserError) as caught:
        load_config("job.yaml")
    assert str(caught.value).splitlines()[0] == message


def test_all_mistakes_are_told_at_once(job: Path):
    with pytest.raises(UserError) as caught:
        load_config("job.yaml", ["peft.rnk_pattern={}", "train.max_steps=many", "data.train=absent.jsonl"])
    assert str(caught.value).splitlines() == [
        "override 'peft.rnk_pattern={}': unknown key 'rnk_pattern' in peft; did you mean 'rank_pattern'?",
        "override 'train.max_steps=many': train.max_steps is 'many' (text); it takes a whole number",
        "override 'data.train=absent.jsonl': data.train: there is no file absent.jsonl in the current folder or beside "
        "job.yaml",
    ]


def test_an_override_without_its_section(job: Path):
    with pytest.raises(UserError) as caught:
        load_config("job.yaml", ["max_steps=100"])
    assert str(caught.value) == (
        "override 'max_steps=100': unknown key 'max_steps' at the top level; did you mean train.max_steps?"
    )


def test_how_a_start_treats_the_folder_is_no_setting_of_the_run(job: Path):
    """The run folder's config.yaml had ``overwrite: true``, and running it again erased the run."""
    config = load_config("job.yaml", ["train.overwrite=true", "train.resume=true"])
    assert config.train.resume and config.train.overwrite
    assert not {"resume", "overwrite"} & yaml.safe_load(config.to_yaml())["train"].keys()


def test_a_section_that_is_no_mapping(job: Path):
    with pytest.raises(UserError, match=r"^override 'peft=lora': peft is 'lora' \(text\); it takes keys and values$"):
        load_config("job.yaml", ["peft=lora"])


def test_frozen_weights_cannot_be_trained_whole(job: Path):
    with pytest.raises(UserError) as caught:
        load_config("job.yaml", ["peft.method=none", "model.quantize=nf4"])
    assert str(caught.value) == (
        "override 'peft.method=none': peft.method none trains all weights, and model.quantize nf4 freezes them; "
        "use peft.method lora or model.quantize none"
    )
    assert load_config("job.yaml", ["peft.method=none"]).peft.config is None
