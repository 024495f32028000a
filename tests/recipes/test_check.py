"""``fastpeft check``: what it finds, how it says so, and with which exit code."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from fastpeft.cli import main
from fastpeft.errors import UserError
from fastpeft.recipes import load_config, run_check, run_sft
from fastpeft.recipes.check import described


def check(job, *arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(["check", str(job / "job.yaml"), "--workers", "1", *arguments])
    return left.value.code or 0, capsys.readouterr()


def codes(report):
    return {finding.code: finding.count for finding in report.findings}


def test_good_data_is_counted_and_shown(job, capsys):
    code, shown = check(job, capsys=capsys)
    assert code == 0
    assert "train.jsonl: 8 rows, sft data, checked as sft; form: input/output\n" in shown.out
    assert "nothing to complain of" in shown.out
    assert shown.out.count("-- train.jsonl:") == 5
    assert not (job / "out").exists()


def test_bad_rows_are_errors_with_file_and_line(job, rows, write_rows, capsys):
    write_rows(job / "train.jsonl", [*rows, {"inptu": "a", "output": "b"}])
    code, shown = check(job, capsys=capsys)
    assert code == 1
    assert "error [bad-row] train.jsonl: 1 bad rows" in shown.out
    assert "train.jsonl:9: no key 'input'" in shown.out and "did you mean" in shown.out
    code, shown = check(job, "data.on_bad_row=skip", capsys=capsys)
    assert code == 0 and "warning [bad-row]" in shown.out
    assert check(job, "data.on_bad_row=skip", "--strict", capsys=capsys)[0] == 1


def test_forms_are_named_and_counted(job, rows, write_rows):
    more = [{"instruction": "a", "input": "b", "output": "c"}, {"text": "seven green cups"}, {"text": "cups"}]
    write_rows(job / "train.jsonl", [*rows, *more])
    report = run_check(job / "job.yaml", workers=1)
    assert described(report)[0].plain.endswith("; forms: input/output 8, text 2, Alpaca 1")
    assert json.loads(report.as_json())["sources"][0]["forms"] == {"input/output": 8, "text": 2, "Alpaca": 1}


def test_each_finding_has_its_count_and_first_places(job, rows, write_rows):
    long = {"input": "seven green cups " * 40, "output": "7"}
    endless = {"input": "a", "output": "seven green cups " * 40}
    write_rows(job / "train.jsonl", [*rows, rows[0], rows[1], long, endless, {"input": "a", "output": ""}])
    write_rows(
        job / "val.jsonl", [rows[2], {"input": rows[3]["input"], "output": "?"}, {"input": "new", "output": "x"}]
    )
    report = run_check(job / "job.yaml", ["data.eval=val.jsonl"], workers=1)
    assert codes(report) == {"duplicate": 2, "too-long": 1, "dropped": 1, "empty": 1, "overlap": 2}
    told = {finding.code: finding.message for finding in report.findings}
    assert "train.jsonl:9 (as line 1), train.jsonl:10 (as line 2)" in told["duplicate"]
    assert told["too-long"].endswith("train.jsonl:11") and told["dropped"].endswith("train.jsonl:12")
    assert "val.jsonl: 2 of 3 rows have a prompt of train.jsonl too: val.jsonl:1, val.jsonl:2" in told["overlap"]
    assert "longest" not in told and report.errors == 0


def test_nothing_left_to_train_on_is_an_error(job, write_rows):
    write_rows(job / "train.jsonl", [{"input": "a", "output": "seven green cups " * 40}])
    report = run_check(job / "job.yaml", workers=1)
    assert codes(report) == {"no-rows": 1, "dropped": 1} and report.errors == 1


def test_marks_stand_where_there_are_no_colours_and_colours_where_there_are(job):
    report = run_check(job / "job.yaml", workers=1)
    _, pieces = report.samples[0]
    answers = [text for text, carries_loss in pieces if carries_loss]
    assert len(answers) == 1 and answers[0].endswith("<|end|>")
    plain, coloured = io.StringIO(), io.StringIO()
    for file, options in ((plain, {}), (coloured, {"force_terminal": True, "color_system": "standard"})):
        console = Console(file=file, highlight=False, soft_wrap=True, **options)
        for line in described(report):
            console.print(line)
    assert f"«{answers[0]}»" in plain.getvalue() and "\x1b[" not in plain.getvalue()
    assert "\x1b[1;32m«" in coloured.getvalue()


@pytest.mark.parametrize("kind", ["dpo", "reward", "ppo"])
def test_other_kinds_are_told_by_sections_and_rows(job, write_rows, kind, rows):
    text = (job / "job.yaml").read_text()
    if kind == "ppo":
        (job / "rules.py").write_text("def brief(**given): return []\n")
        text += "reward:\n  function: rules.py:brief\n"
        write_rows(job / "train.jsonl", [{"prompt": row["input"]} for row in rows])
    else:
        pair = {"prompt": "seven cups", "chosen": "7", "rejected": "8"}
        write_rows(job / "train.jsonl", [pair, {**pair, "rejected": "7"}])
        text += "  center_rewards_coefficient: 0.01\n" if kind == "reward" else "  beta: 0.2\n"
    (job / "job.yaml").write_text(text)
    report = run_check(job / "job.yaml", workers=1)
    assert report.kind == kind
    assert report.samples
    assert codes(report) == ({} if kind == "ppo" else {"equal": 1})


def test_the_kind_can_be_given_and_is_checked(job):
    report = run_check(job / "job.yaml", kind="reward", workers=1)
    assert codes(report)["bad-row"] == 8 and report.errors == 2
    with pytest.raises(UserError, match="kind is 'rm'; it must be one of sft, reward, dpo, ppo"):
        run_check(job / "job.yaml", kind="rm")


def test_a_mistake_in_the_configuration_is_code_2(job, capsys):
    code, shown = check(job, "train.max_stepz=3", capsys=capsys)
    assert code == 2 and "unknown key 'max_stepz' in train" in shown.err
    assert check(job, "data.train=none.jsonl", capsys=capsys)[0] == 2


def test_json_is_for_programs(job, rows, write_rows, capsys):
    write_rows(job / "train.jsonl", [*rows, rows[0]])
    code, shown = check(job, "--json", capsys=capsys)
    found = json.loads(shown.out)
    assert code == 0 and found["kind"] == "sft"
    assert found["sources"][0]["rows"] == 9
    assert [finding["code"] for finding in found["findings"]] == ["duplicate"]


def test_no_weights_are_read(job, model_folder, tmp_path):
    """The file of the weights has to be there, and may be broken."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model_folder.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    (bare / "model.safetensors").write_bytes(b"")
    assert run_check(job / "job.yaml", [f"model.path={bare}"], workers=1).samples


def test_a_run_holds_out_a_fraction_and_tells_of_leaks(job, rows, write_rows):
    config = load_config(job / "job.yaml", ["data.eval_fraction=0.25", "train.max_steps=1"])
    said: list[str] = []
    run_sft(config, said.append)
    assert "train.jsonl: 6 rows to train on, 2 held out" in said
    logged = [json.loads(line) for line in (job / "out/metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in logged)

    write_rows(job / "val.jsonl", [rows[0], {"input": "new", "output": "x"}])
    run_sft(
        load_config(job / "job.yaml", ["data.eval=val.jsonl", "train.output_dir=two", "train.max_steps=1"]), said.append
    )
    assert any(line.startswith("val.jsonl: 1 of 2 rows have a prompt that train.jsonl has too") for line in said)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.eval_fraction=1.5"], "data.eval_fraction is 1.5; it must be above 0 and below 1"),
        (["data.eval_fraction=0.1", "data.eval=train.jsonl"], "both say what to evaluate on; give one of them"),
        (["data.eval_fraction=much"], "data.eval_fraction is 'much'"),
        (["train.eval_strategy=epoch"], "or data.eval_fraction a share of the rows"),
    ],
)
def test_fractions_that_are_none(job, overrides, words):
    with pytest.raises(UserError) as caught:
        load_config(job / "job.yaml", overrides)
    assert words in str(caught.value)


def test_a_run_with_a_cache_learns_the_same(job):
    losses = []
    for folder, extra in (("one", []), ("two", ["data.cache_dir=cache"]), ("three", ["data.cache_dir=cache"])):
        run_sft(load_config(job / "job.yaml", [f"train.output_dir={folder}", *extra]), lambda line: None)
        lines = map(json.loads, (job / folder / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1] == losses[2]
    assert len(list((job / "cache").iterdir())) == 1
