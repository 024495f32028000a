"""The demo's data can be made again, keeps its promises, and the demo runs from end to end on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SPLITS = ("train", "val", "test")
KEYS = ["name", "city", "date", "items"]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    files = {split: EXAMPLES / "data" / f"orders_{split}.jsonl" for split in SPLITS}
    return {split: [json.loads(line) for line in file.read_text().splitlines()] for split, file in files.items()}


def test_the_generator_gives_the_committed_bytes(tmp_path):
    subprocess.run([sys.executable, EXAMPLES / "orders" / "generate.py", "--out", tmp_path], check=True, timeout=60)
    for split in SPLITS:
        name = f"orders_{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes(), name


def test_another_seed_gives_other_rows(tmp_path):
    command = [sys.executable, EXAMPLES / "orders" / "generate.py", "--out", tmp_path, "--seed", "1"]
    subprocess.run(command, check=True, timeout=60)
    name = "orders_test.jsonl"
    assert (tmp_path / name).read_bytes() != (EXAMPLES / "data" / name).read_bytes()


def test_sizes(rows):
    assert {split: len(rows[split]) for split in SPLITS} == {"train": 2000, "val": 100, "test": 200}
    assert sum((EXAMPLES / "data" / f"orders_{split}.jsonl").stat().st_size for split in SPLITS) < 1_500_000


def test_no_mail_and_no_order_occurs_twice(rows):
    every = [row for split in SPLITS for row in rows[split]]
    assert len({row["input"] for row in every}) == len(every)
    assert len({row["output"] for row in every}) == len(every)


def test_two_wordings_are_in_the_test_rows_alone(rows):
    templates = {split: {row["template"] for row in rows[split]} for split in SPLITS}
    assert len(templates["train"]) >= 12
    assert templates["val"] == templates["train"]
    assert len(templates["test"] - templates["train"]) == 2
    unseen = [row for row in rows["test"] if row["template"] not in templates["train"]]
    assert len(unseen) == 50


def test_answers_have_one_form_and_are_in_the_mail(rows):
    """Each value can be found in the mail as it is: names, cities and dates whole, products word by word."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    for row in (row for split in SPLITS for row in rows[split]):
        order = json.loads(row["output"])
        assert json.dumps(order) == row["output"]
        assert list(order) == KEYS
        assert 1 <= len(order["items"]) <= 3
        for key in KEYS[:3]:
            assert order[key] is None or order[key] in row["input"]
        for quantity, product in order["items"]:
            stem = re.escape(product[:-1])  # scarf, scarves
            count = "|".join([str(quantity), *words[quantity - 1 : quantity]])
            assert re.search(rf"\b({count})( x)? {stem}|{stem}\w: {quantity}\b", row["input"]), row


def test_fields_are_missing_and_mails_distract_often_enough(rows):
    orders = [json.loads(row["output"]) for row in rows["train"]]
    for key in KEYS[:3]:
        assert 0.05 < sum(order[key] is None for order in orders) / len(orders) < 0.35, key
    assert sum(len(order["items"]) > 1 for order in orders) / len(orders) > 0.3
    distractors = (
        r"Tel\. \d|call me on|last order was|says hello|the fair in|Greetings to|^> |away until|Your invoice of"
    )
    distracted = sum(bool(re.search(distractors, row["input"], re.MULTILINE)) for row in rows["train"])
    assert distracted / len(orders) > 0.5
    spelt = sum(bool(re.search(r"\b(two|three|four|five|six|seven)\b", row["input"])) for row in rows["train"])
    assert spelt / len(orders) > 0.1
