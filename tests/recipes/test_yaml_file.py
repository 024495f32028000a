"""YAML with lines: what is read, what is refused, and where messages point."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpeft.errors import UserError
from fastpeft.recipes.yaml_file import read_settings


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str, *overrides: str):
    Path("a.yaml").write_text(text, encoding="utf-8")
    return read_settings("a.yaml", overrides)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e-4", 2e-4),
        ("2E4", 2e4),
        ("1_000", 1000),
        (".5", 0.5),
        ("-1.", -1.0),
        ("0x10", 16),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'2e-4'", "2e-4"),
        ("[1, 2e3, x]", [1, 2000.0, "x"]),
    ],
)
def test_plain_words_are_read_as_yaml_1_2_reads_them(written, value):
    found = read(f"a: {written}\n").values["a"]
    assert found == value and type(found) is type(value)


def test_every_key_knows_its_line():
    settings = read("a:\n  b: 1\n\n  c: {d: 2,\n      e: 3}\n")
    assert settings.origin("a", "b") == "a.yaml:2"
    assert settings.origin("a", "c", "e") == "a.yaml:5"
    assert settings.origin("a", "absent") == "a.yaml:1"
    assert settings.origin("absent") == "a.yaml"


def test_merge_keys_give_defaults():
    settings = read("base: &base {x: 1, y: 2}\nother:\n  <<: *base\n  y: 3\n")
    assert settings.values["other"] == {"x": 1, "y": 3}


def test_overrides_are_yaml_and_the_last_one_wins():
    settings = read("a: {b: 1}\n", "a.b=2e-4", "a.c=[q, v]", "d.e=x", "a.b=no")
    assert settings.values == {"a": {"b": "no", "c": ["q", "v"]}, "d": {"e": "x"}}
    assert settings.origin("a", "b") == "override 'a.b=no'"
    assert read("a: {b: 1}\n", "a={c: 2}").values == {"a": {"c": 2}}


def test_references_keep_types_and_see_overrides():
    settings = read("a: {lr: 2e-4, name: x}\nb: {lr: '${a.lr}', out: 'runs/${a.name}'}\n", "a.name=y")
    assert settings.values["b"] == {"lr": 2e-4, "out": "runs/y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.yaml: the file is empty; it needs at least the sections model, data and train"),
        ("# nothing\n", "a.yaml: the file is empty; it needs at least the sections model, data and train"),
        ("- a\n", "a.yaml:1: the top level has to be a mapping such as 'model:', and is ['a'] (a list)"),
        ("a: 1\nb: 2\na: 3\n", "a.yaml:3: key 'a' stands twice; it is already on line 1"),
        ("a:\n  b: 1\n  b: 1\n", "a.yaml:3: key 'b' stands twice; it is already on line 2"),
        ("a:\n\tb: 1\n", "a.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: [1, 2\nb: 3\n", "a.yaml:2: not valid YAML: expected ',' or ']', but got ':'"),
        ("a: b: c\n", "a.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: 'b\n", "a.yaml:2: not valid YAML: found unexpected end of stream"),
        ("a: *b\n", "a.yaml:1: not valid YAML: found undefined alias 'b'"),
        ("a: &a [*a]\n", "a.yaml: an anchor (&name) contains itself"),
        ("a: 1\n---\nb: 1\n", "a.yaml:2: not valid YAML: but found another document"),
        ("[a]: 1\n", "a.yaml:1: a key has to be a plain word"),
        ("a:\n  b: ${c.d}\n", "a.yaml:2: a.b cannot be filled in: Interpolation key 'c.d' not found"),
        ("a:\n  b: ${a.b}\n", "a.yaml:2: a.b cannot be filled in: Recursive interpolation detected"),
        ("a:\n  b: ???\n", "a.yaml:2: a.b is '???', so it has to be given: add a.b=VALUE"),
        (
            "a: !!python/object/apply:os.system [x]\n",
            "a.yaml:1: not valid YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
    ],
)
def test_mangled_files_get_one_message_with_the_line(text, message):
    with pytest.raises(UserError) as caught:
        read(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "override 'a': not of the form section.key=value, such as train.max_steps=100"),
        ("=1", "override '=1': not of the form section.key=value, such as train.max_steps=100"),
        ("a..b=1", "override 'a..b=1': not of the form section.key=value, such as train.max_steps=100"),
        ("a.b.c=1", "override 'a.b.c=1': a.b is 1 and has no keys"),
        (
            "a.b=[1",
            "override 'a.b=[1': not valid YAML: expected ',' or ']', but got '<stream end>'",
        ),
    ],
)
def test_mangled_overrides(override, message):
    with pytest.raises(UserError) as caught:
        read("a: {b: 1}\n", override)
    assert str(caught.value) == message


def test_missing_and_binary_files():
    with pytest.raises(UserError, match=r"^absent\.yaml: there is no such file$"):
        read_settings("absent.yaml")
    Path("b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"^b\.yaml: cannot be read as text: "):
        read_settings("b.yaml")
