"""README and docs/ read as instructions: the code blocks of a page in their order, and a reader who does what they say.

What becomes of a block goes by its language:

    yaml      the first line is a comment with the command that takes it, "# fastpeft sft run.yaml": the file of that
              name is written, and the command resolves it (--dry-run)
    bash      every fastpeft command runs, with a step in the place of many; what does not run stands in `NOT_RUN`
    python    runs as it stands, all blocks of a page in one namespace
    console   what follows "$" is a command as in bash, and the lines below it are what it prints, "..." for anything
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fastpeft.cli import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = (README, *DOCS)
# Commands in pages that are not run by a reader of ours, and why.
NOT_RUN = {
    "make": "it makes an environment; that the targets exist is asked",
    "pip install": "it changes the environment, from the network; .ci/run does it",
    "python -m bench": "it takes minutes and a GPU; tests/bench run the suites",
    "pytest": "it would be the suite within the suite",
    "torchrun": "it takes a GPU for each process",
}
_TRAINING = ("sft", "reward", "dpo", "ppo", "finetune")
_STEPS = re.compile(r"(.*\bmax_steps)=\d+")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match[1], match[2], text[: match.start()].count("\n") + 1)
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    ]
    assert 2 * len(found) == len(re.findall(r"^```", text, flags=re.M)), f"{page.name}: a fence is not closed"
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each command of a bash block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def links(page: Path) -> list[str]:
    """Where the links of a page lead, but for those that leave the project."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


class Reader:
    """Does what a page says, in the current folder.

    Args:
        page: the page.
        shown: takes what was printed since it was last asked, standard output and errors together.
    """

    def __init__(self, page: Path, shown: Callable[[], str]) -> None:
        self._page = page
        self._shown = shown
        self._names: dict[str, object] = {"__name__": page.stem}

    def follow(self) -> None:
        """Take the blocks in their order."""
        kinds = {"yaml": self._yaml, "bash": self._bash, "python": self._python, "console": self._console}
        for block in blocks(self._page):
            where = f"{self._page.name}:{block.line}"
            assert block.language in kinds, f"{where}: a block of {block.language or 'no language'} is read by nobody"
            kinds[block.language](block.text, where)

    def _python(self, text: str, where: str) -> None:
        # Empty lines before it, so that a traceback has the page's own line numbers.
        exec(compile("\n" * int(where.rpartition(":")[2]) + text, self._page.name, "exec"), self._names)

    def _yaml(self, text: str, where: str) -> None:
        first = text.splitlines()[0].removeprefix("# ").split()
        assert first[0] == "fastpeft" and len(first) == 3, f"{where}: the first line must say which command takes it"
        Path(first[2]).write_text(text, encoding="utf-8")
        code, shown = self._run([*first[1:], "--dry-run"])
        assert code == 0, f"{where}: {shown}"
        if first[1] != "finetune":
            assert set(yaml.safe_load(text)) <= set(yaml.safe_load(shown)), where

    def _bash(self, text: str, where: str) -> None:
        for words in commands(text):
            line = " ".join(words)
            if words[0] == "fastpeft":
                code, shown = self._run(shortened(words[1:]))
                assert code == 0, f"{where}: {line}\n{shown}"
            else:
                assert any(line.startswith(known) for known in NOT_RUN), f"{where}: nobody runs {line!r}"

    def _console(self, text: str, where: str) -> None:
        for exchange in re.split(r"^\$ ", text, flags=re.M)[1:]:
            command, _, expected = exchange.partition("\n")
            words = shlex.split(command)
            assert words[0] == "fastpeft", f"{where}: nobody runs {command!r}"
            code, shown = self._run(shortened(words[1:]))
            assert (code == 2) == ("error: " in shown), f"{where}: $ {command}\nit left with {code}"
            pattern = r"[^\n]*".join(re.escape(part) for part in expected.rstrip("\n").split("..."))
            assert re.search(rf"^{pattern}$", shown, flags=re.M), f"{where}: $ {command}\nit printed:\n{shown}"

    def _run(self, words: list[str]) -> tuple[int, str]:
        """Exit code of a fastpeft command, and what it printed."""
        self._shown()
        with pytest.raises(SystemExit) as left:
            main(words)
        return int(left.value.code or 0), self._shown()


def shortened(words: list[str]) -> list[str]:
    """A command with one step of training, or a few tokens of an answer, in the place of many; others as they are."""
    if words[0] == "generate" and "--max-new-tokens" not in words:
        return [*words, "--max-new-tokens", "8"]
    if words[0] not in _TRAINING or "--dry-run" in words:
        return words
    if not any("max_step" in word for word in words):
        return [*words, "trainer.max_steps=1" if words[0] == "finetune" else "train.max_steps=1"]
    return [_STEPS.sub(r"\1=1", word) for word in words]
