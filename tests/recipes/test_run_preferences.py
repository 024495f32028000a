"""``fastpeft reward``, ``dpo`` and ``ppo`` from end to end on a tiny model, in their order; and mistakes on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastpeft.cli import main
from fastpeft.errors import UserError
from fastpeft.recipes import load_config, run_dpo, run_ppo, run_reward

RULES = "def brief(prompts, completions, **columns):\n    return [-len(text) / 100 for text in completions]\n"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def rl_job(job: Path, write_rows) -> Path:
    """The folder of ``job`` with preferences, prompts and a reward function."""
    pairs = [{"prompt": f"Add {n} and 1.", "chosen": f"The sum is {n + 1}.", "rejected": "No."} for n in range(8)]
    write_rows(job / "pairs.jsonl", pairs)
    write_rows(job / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs])
    (job / "rules.py").write_text(RULES)
    return job


PPO = ["data.train=prompts.jsonl", "train.response_length=6", "train.num_ppo_epochs=1", "train.max_steps=2"]


def test_the_stages_in_order(rl_job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sft", "job.yaml", "train.max_steps=1", "train.output_dir=sft") == 0
    assert run("reward", "job.yaml", "data.train=pairs.jsonl", "data.eval=pairs.jsonl", "train.output_dir=rm") == 0
    assert "pairs.jsonl: 8 of 8 rows, 8 pairs" in capsys.readouterr().out
    assert any("eval_accuracy" in row for row in metrics(rl_job / "rm"))
    weights = load_file(rl_job / "rm/adapter/adapter_model.safetensors")
    assert "base_model.model.score.weight" in weights
    held = ["peft={adapter: sft/adapter}"]
    assert run("dpo", "job.yaml", "data.train=pairs.jsonl", "train.output_dir=dpo", *held) == 0
    assert next(row["loss"] for row in metrics(rl_job / "dpo") if "loss" in row) == pytest.approx(0.6931, abs=1e-4)
    assert sorted(path.name for path in (rl_job / "dpo/adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    scored = ["reward={adapter: rm/adapter, function: 'rules.py:brief'}"]
    assert run("ppo", "job.yaml", "train.output_dir=ppo", *PPO, *held, *scored) == 0
    rows = [row for row in metrics(rl_job / "ppo") if "loss" in row]
    assert len(rows) == 2 and {"objective/kl", "objective/scores", "policy/approxkl_avg", "episode"} <= set(rows[0])
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5), "the reference is the adapter it went on from"
    assert rows[1]["objective/kl"] != 0.0
    said = [json.loads(line) for line in (rl_job / "ppo/completions.jsonl").read_text().splitlines()]
    assert said[0]["step"] == 1 and {"prompt", "completion", "score", "kl"} <= set(said[0])
    saved = yaml.safe_load((rl_job / "ppo/config.yaml").read_text())
    assert saved["reward"]["function"] == f"{rl_job}/rules.py:brief"
    assert saved["peft"]["adapter"] == str(rl_job / "sft/adapter")
    before, after = (load_file(rl_job / name / "adapter/adapter_model.safetensors") for name in ("sft", "ppo"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert run("ppo", "job.yaml", "train.output_dir=new", *PPO, *scored) == 0
    assert run("generate", "ppo", "--prompt", "Add 1 and 1.", "--max-new-tokens", "3") == 0


@pytest.mark.parametrize("kind", ["reward", "ppo"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(rl_job: Path, kind: str) -> None:
    run_it = {"reward": run_reward, "ppo": run_ppo}[kind]
    options = {"reward": ["data.train=pairs.jsonl"], "ppo": [*PPO, "reward={function: 'rules.py:brief'}"]}[kind]
    options = [*options, "train.save_strategy=steps", "train.save_steps=2", "train.lr_scheduler_type=constant"]
    for name, more in (("whole", ["train.max_steps=4"]), ("half", ["train.max_steps=2"])):
        run_it(load_config("job.yaml", [*options, *more, f"train.output_dir={name}"], kind))
    resumed = [*options, "train.max_steps=4", "train.output_dir=half", "train.resume=true"]
    run_it(load_config("job.yaml", resumed, kind))
    whole, half = (load_file(rl_job / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "half"))
    for name in whole:
        assert torch.equal(whole[name], half[name]), name
    if kind == "ppo":
        one, other = (rl_job / name / "completions.jsonl" for name in ("whole", "half"))
        written = [json.loads(line) for line in other.read_text().splitlines() if json.loads(line)["step"] == 4]
        assert written == [json.loads(line) for line in one.read_text().splitlines() if json.loads(line)["step"] == 4]


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("ppo", [], "reward is missing"),
        ("ppo", ["reward={function: rules.py}"], "as rules.py:brief"),
        ("ppo", ["reward={function: 'other.py:brief'}"], "there is no file other.py"),
        ("ppo", ["reward={adapter: nowhere}"], "reward.adapter: there is no folder nowhere"),
        ("ppo", ["reward={function: 'rules.py:brief'}", "train.advantage=group"], "train.num_generations is 1"),
        ("ppo", ["reward={function: 'rules.py:brief'}", "train.kl_coef=-1"], "train.kl_coef is -1"),
        ("dpo", ["train.loss_type=sigmod"], "did you mean 'sigmoid'"),
        ("dpo", ["train.betta=1"], "unknown key 'betta' in train; did you mean 'beta'"),
        ("dpo", ["peft.adapter=nowhere"], "peft.adapter: there is no folder nowhere"),
        ("dpo", ["reward={function: 'rules.py:brief'}"], "unknown key 'reward' at the top level"),
        ("reward", ["train.center_rewards_coefficient=-1"], "train.center_rewards_coefficient is -1"),
        ("reward", ["data.max_length=1"], "data.max_length is 1"),
    ],
)
def test_mistakes_in_the_settings(rl_job: Path, kind: str, options: list[str], told: str) -> None:
    data = "prompts" if kind == "ppo" else "pairs"
    with pytest.raises(UserError) as error:
        load_config("job.yaml", [f"data.train={data}.jsonl", *options], kind)
    assert told in str(error.value)


def test_mistakes_found_before_the_model_is_loaded(rl_job: Path) -> None:
    none = ["data.train=pairs.jsonl", "peft={method: none}"]
    with pytest.raises(UserError, match="precompute_ref_log_probs: true"):
        run_dpo(load_config("job.yaml", none, "dpo"))
    given = ["data.train=prompts.jsonl", "reward={function: 'rules.py:%s'}"]
    with pytest.raises(UserError, match="has no function long"):
        run_ppo(load_config("job.yaml", [option.replace("%s", "long") for option in given], "ppo"))
    (rl_job / "rules.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="raised ModuleNotFoundError"):
        run_ppo(load_config("job.yaml", [option.replace("%s", "brief") for option in given], "ppo"))
    assert not (rl_job / "out").exists()


def test_all_weights_by_dpo(rl_job: Path) -> None:
    """The model's start is the reference, kept on disk; a second run reads it there."""
    options = ["data.train=pairs.jsonl", "peft={method: none}", "train.precompute_ref_log_probs=true"]
    options += ["train.reference_cache=cache", "train.max_steps=1"]
    for name in ("one", "two"):
        run_dpo(load_config("job.yaml", [*options, f"train.output_dir={name}"], "dpo"))
    assert len(list((rl_job / "cache").iterdir())) == 1
    assert (rl_job / "one/model/model.safetensors").is_file()


METHODS = {
    "ia3": "{method: ia3}",
    "prompt_tuning": "{method: prompt_tuning, num_virtual_tokens: 4}",
    "p_tuning": "{method: p_tuning, num_virtual_tokens: 4, encoder_hidden_size: 16}",
    "adapter": "{method: adapter}",
    "full": "{method: full, train: [layers]}",
    "qlora": "{method: qlora, r: 4}",
}
REFUSED = {
    ("reward", "adapter"): "peft.method adapter keeps no copy of the score layer that a reward model needs",
    ("ppo", "adapter"): "peft.method adapter keeps no copy of the score layer that the value head",
    ("ppo", "full"): "fastpeft ppo trains an adapter, so that the model without it is the reference",
}


@pytest.mark.parametrize("kind", ["reward", "dpo", "ppo"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_learns_from_preferences_or_says_why_not(
    rl_job: Path, kind: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"peft={METHODS[method]}", f"train.output_dir={kind}", "train.max_steps=2", "train.learning_rate=1e-2"]
    if kind == "ppo":
        options += [*PPO, "reward={function: 'rules.py:brief'}"]
    else:
        options.append("data.train=pairs.jsonl")
    if (kind, method) == ("dpo", "full"):
        options.append("train.precompute_ref_log_probs=true")
    code = run(kind, "job.yaml", *options)
    said = capsys.readouterr()
    if (kind, method) in REFUSED:
        assert code == 2 and REFUSED[kind, method] in said.err
        return
    assert code == 0, said.err
    assert sum("loss" in row for row in metrics(rl_job / kind)) == 2
    result = rl_job / kind / ("model" if method == "full" else "adapter")
    tensors = {name for file in result.glob("*.safetensors") for name in load_file(file)}
    assert any("score" in name for name in tensors) == (kind == "reward")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "dpo",
            ["peft={method: prompt_tuning}", "train.layout=shared"],
            "override 'train.layout=shared': train.layout is 'shared', and the virtual tokens of peft.method "
            "prompt_tuning stand before every row; use padded",
        ),
        (
            "ppo",
            ["peft={method: p_tuning}", "train.num_generations=2", "reward={function: 'rules.py:brief'}"],
            "override 'train.num_generations=2': train.num_generations is 2, whose answers share the row of their "
            "prompt, and the virtual tokens of peft.method p_tuning need a row each; set it to 1, or use peft.method "
            "lora",
        ),
        (
            "dpo",
            ["peft={method: full}"],
            "override 'peft={method: full}': peft.method full trains the model's own weights, so that it cannot be "
            "its own reference; set train.precompute_ref_log_probs: true, or use peft.method lora",
        ),
    ],
)
def test_what_a_method_cannot_do(rl_job: Path, kind: str, options: list[str], message: str) -> None:
    config = load_config("job.yaml", ["data.train=pairs.jsonl", *options], kind=kind)
    with pytest.raises(UserError) as caught:
        {"dpo": run_dpo, "ppo": run_ppo}[kind](config)
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", ["reward", "dpo", "ppo"])
def test_several_files_with_weights_from_a_cache(rl_job: Path, write_rows, kind: str) -> None:
    """The rows and the losses are those without a cache, and weights are shares of the rows."""
    name = "prompts" if kind == "ppo" else "pairs"
    lines = [json.loads(line) for line in (rl_job / f"{name}.jsonl").read_text().splitlines()]
    write_rows(rl_job / "one.jsonl", lines[:2])
    write_rows(rl_job / "two.jsonl", lines[2:])
    options = [*PPO, "reward={function: 'rules.py:brief'}"] if kind == "ppo" else ["train.max_steps=2"]
    if kind == "dpo":
        options.append("train.precompute_ref_log_probs=true")
    options.append("data.train=[{path: one.jsonl, weight: 0.75}, {path: two.jsonl, weight: 0.25}]")
    losses = []
    for folder, extra in (("out1", []), ("out2", ["data.cache_dir=cache"]), ("out3", ["data.cache_dir=cache"])):
        said: list[str] = []
        config = load_config(rl_job / "job.yaml", [*options, *extra, f"train.output_dir={folder}"], kind=kind)
        {"reward": run_reward, "dpo": run_dpo, "ppo": run_ppo}[kind](config, said.append)
        assert any(f"6 of {rl_job / 'one.jsonl'}, 2 of {rl_job / 'two.jsonl'}" in line for line in said)
        losses.append([row["loss"] for row in metrics(rl_job / folder) if "loss" in row])
    assert losses[0] == losses[1] == losses[2] != []
    assert len(list((rl_job / "cache").iterdir())) == 2
