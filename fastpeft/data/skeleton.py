"""What a chat template writes around the texts of a dialogue, so that a million rows need not run the template.

Most templates put the contents of the turns between fixed texts. `find_skeleton` takes those from one rendering, then
tries to prove the template wrong: every string that stands in its source, and what templates are known to treat in a
way of its own (white space, thoughts, braces), is put into each turn, and the rendering has to be the one foretold.
A template that looks into a text compares it with strings of its own, so these are the texts to try.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastpeft.data.forms import Message, Record
from fastpeft.data.row_values import RowError

if TYPE_CHECKING:
    from fastpeft.data.layout import Encoder

LONGEST = 4  # turns of a dialogue for which the search pays
_MARK = "q{}Zk{}Xv"  # letters that no template writes by itself
_PROBES = (
    *("", "a", " a ", "\na\n", "\n", "a\n\nb", "  a  b", "{{ a }}", "{% a %}", "<think>\na\n</think>\n\nb", "</think>"),
    *("[1, 2]", '{"a": "b"}', "a'b\"c", "é\u00a0\u2028", "0", "None", "user", "assistant", "system", "<a>", "a" * 3000),
)
_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)


@dataclass(frozen=True)
class Skeleton:
    """The fixed texts of a dialogue with certain roles.

    Args:
        fixed: what stands before each content, and what follows the last; one more than there are turns.
        stripped: whether the template takes white space off the ends of each content.
        add_eos: whether EOS follows, since the template ends an answer with no token of its own.
    """

    fixed: tuple[str, ...]
    stripped: tuple[bool, ...]
    add_eos: bool

    def render(self, contents: Sequence[str]) -> tuple[str, int]:
        """The text of a dialogue whose last turn is its only answer, and where in it that begins."""
        pieces = [self.fixed[0]]
        for content, strip, after in zip(contents, self.stripped, self.fixed[1:], strict=True):
            pieces += (content.strip() if strip else content, after)
        text = "".join(pieces)
        return text, len(text) - len(pieces[-1]) - len(pieces[-2])


def find_skeleton(encoder: Encoder, roles: Sequence[str], template: str) -> Skeleton | None:
    """The skeleton of dialogues with these roles, or None where the template does more than to put texts together.

    Args:
        encoder: renders with the template.
        roles: of the turns; the last is the assistant's, and no other.
        template: its source.
    """
    if len(roles) > LONGEST or "assistant" in roles[:-1]:
        return None
    marks = [_MARK.format(index, index) for index in range(len(roles))]
    rendered = _rendered(encoder, roles, marks)
    if rendered is None:
        return None
    text, _, add_eos = rendered
    fixed, rest = [], text
    for mark in marks:
        if rest.count(mark) != 1:
            return None
        before, rest = rest.split(mark)
        fixed.append(before)
    skeleton = Skeleton(
        (*fixed, rest), tuple(_strips(encoder, roles, marks, index) for index in range(len(roles))), add_eos
    )
    for contents in _probes(marks, template):
        if _rendered(encoder, roles, contents) != (*skeleton.render(contents), add_eos):
            return None
    return skeleton


def _rendered(encoder: Encoder, roles: Sequence[str], contents: Sequence[str]) -> tuple[str, int, bool] | None:
    turns = tuple(Message(role, content) for role, content in zip(roles, contents, strict=True))
    try:
        text = encoder.render(Record(turns, "probe"))
    except RowError:
        return None
    return text.text, text.answers[0][0], text.add_eos


def _strips(encoder: Encoder, roles: Sequence[str], marks: Sequence[str], index: int) -> bool:
    padded = [*marks]
    padded[index] = f" {marks[index]} "
    rendered = _rendered(encoder, roles, padded)
    return rendered is not None and padded[index] not in rendered[0]


def _probes(marks: Sequence[str], template: str) -> Iterator[list[str]]:
    strings = {(one or other) for one, other in _STRING.findall(template)}
    strings |= {text.encode().decode("unicode_escape", "replace") for text in strings if "\\" in text}
    texts = [
        *_PROBES,
        *(form for text in sorted(strings) if text for form in (text, f"a{text}", f"{text}a", f"b{text}c")),
    ]
    for text in texts:
        for index in range(len(marks)):
            contents = [*marks]
            contents[index] = text
            yield contents
        yield [text] * len(marks)
