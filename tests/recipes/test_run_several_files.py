"""``data.train`` as a list of files, with and without weights."""

from __future__ import annotations

import json

import pytest

from fastpeft.errors import UserError
from fastpeft.recipes import load_config, run_check, run_sft


@pytest.fixture
def two_files(job, rows, write_rows):
    write_rows(job / "one.jsonl", rows[:2])
    write_rows(job / "two.jsonl", rows[2:])
    return job


def test_files_without_weights_are_one_after_another(two_files):
    said: list[str] = []
    run_sft(load_config(two_files / "job.yaml", ["data.train=[one.jsonl, two.jsonl]"]), said.append)
    assert any(f"an epoch has 8 rows: 2 of {two_files / 'one.jsonl'}, 6 of" in line for line in said)
    again = load_config(two_files / "out" / "config.yaml")
    assert again.data.train_files == [(two_files / "one.jsonl", None), (two_files / "two.jsonl", None)]


def test_weights_are_shares_of_the_rows(two_files):
    said: list[str] = []
    files = "data.train=[{path: one.jsonl, weight: 0.75}, {path: two.jsonl, weight: 0.25}]"
    run_sft(load_config(two_files / "job.yaml", [files, "data.cache_dir=cache"]), said.append)
    assert any(f"6 of {two_files / 'one.jsonl'}, 2 of {two_files / 'two.jsonl'}" in line for line in said)


def test_every_file_is_checked(two_files, rows, write_rows):
    write_rows(two_files / "val.jsonl", [rows[0], rows[5], {"input": "new", "output": "x"}])
    report = run_check(two_files / "job.yaml", ["data.train=[one.jsonl, two.jsonl]", "data.eval=val.jsonl"], workers=1)
    assert [len(found.rows) for found in report.surveys] == [2, 6, 3]
    assert [(finding.code, finding.count) for finding in report.findings] == [("overlap", 1), ("overlap", 1)]
    assert json.loads(report.as_json())["sources"][1]["rows"] == 6


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("[]", "data.train is an empty list"),
        ("[one.jsonl, none.jsonl]", "data.train[1]: there is no file none.jsonl"),
        ("[{path: one.jsonl, wieght: 1}]", "data.train[0] is {'path': 'one.jsonl', 'wieght': 1}; it takes a path"),
        ("[{weight: 1}]", "data.train[0] is {'weight': 1}; it takes a path, or path and weight"),
        ("[{path: one.jsonl, weight: -1}]", "data.train[0]: weight is -1; it must be a number above 0"),
        ("[{path: one.jsonl, weight: 1}, two.jsonl]", "some files of data.train have a weight and some have none"),
        ("7", "data.train is 7"),
    ],
)
def test_lists_that_are_none(two_files, train, words):
    with pytest.raises(UserError) as caught:
        load_config(two_files / "job.yaml", [f"data.train={train}"])
    assert words in str(caught.value)


def test_a_fraction_is_for_one_file(two_files):
    with pytest.raises(UserError, match=r"data\.eval_fraction is for one file"):
        load_config(two_files / "job.yaml", ["data.train=[one.jsonl]", "data.eval_fraction=0.5"])
