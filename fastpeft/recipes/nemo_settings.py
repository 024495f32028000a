"""NeMo's settings with their keys in one spelling, and the run's settings that grow out of them.

Every key of the file has to be accounted for: it is translated, or must ask for nothing, or changes nothing here and is
listed once, or nobody knows it and it is refused with the nearest names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError, did_you_mean
from fastpeft.recipes.nemo_keys import ALIGNER, IGNORED, NEUTRAL, ONLY_FOR, OTHER_TRAINERS, READ, TABLE, canonical
from fastpeft.recipes.yaml_file import Key, Settings, Unfilled, shown

OWN = "fastpeft"  # a section of this name holds settings of the run in their own spelling


class NemoSettings:
    """What a NeMo file says, asked for key by key, and what the run is to be.

    Args:
        settings: the file's, read leniently.
    Attributes:
        kind: "sft", "reward", "dpo" or "ppo".
        notes: lines about what is meant otherwise here.
    Raises:
        UserError: the file is for several kinds of run.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._leaves: dict[str, tuple[Any, Key]] = {}
        self.kind = self._kind()
        for key, value in _leaves(settings.values):
            name = canonical(key)
            # trainer.max_steps is ${trainer.sft.max_steps} in NeMo-Aligner's files, and the longer one is meant.
            if name not in self._leaves or len(key) > len(self._leaves[name][1]):
                self._leaves[name] = (value, key)
        self.notes: list[str] = []
        self._values: dict[str, dict[str, Any]] = {"model": {}, "peft": {}, "data": {}, "train": {}}
        self._origins: dict[Key, str] = {}

    # What the file says.

    def has(self, name: str) -> bool:
        """Whether the file gives a value, and not null."""
        return name in self._leaves and self._leaves[name][0] is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, or ``default`` where it is absent or null.

        Raises:
            UserError: the file has ``???`` there, or a reference to nothing.
        """
        value = self._leaves.get(name, (None, ()))[0]
        if isinstance(value, Unfilled):
            raise UserError(f"{self.where(name)}: {self.spelt(name)} {value.reason}: add {self.spelt(name)}=VALUE")
        return default if value is None else value

    def refers_to_nothing(self, name: str) -> bool:
        """Whether the value is a reference that could not be followed."""
        value = self._leaves.get(name, (None, ()))[0]
        return isinstance(value, Unfilled) and "???" not in value.reason

    def first(self, *names: str) -> str | None:
        """The first of some keys that has a value; None if none has."""
        return next((name for name in names if self.has(name)), None)

    def whole(self, name: str, default: int | None = None) -> int | None:
        """A whole number."""
        value = self.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.refusal(name, "it takes a whole number")
        return value

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refusal(name, "it takes a number")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """A truth value, as YAML 1.1 has them too."""
        value = self.get(name, default)
        value = {"yes": True, "on": True, "no": False, "off": False}.get(str(value).lower(), value)
        if not isinstance(value, bool):
            raise self.refusal(name, "it takes true or false")
        return value

    def choice(self, name: str, known: Iterable[str], default: str) -> str:
        """One of some names."""
        known = list(known)
        value = self.get(name, default)
        if value not in known:
            raise self.refusal(name, f"it takes {', '.join(known)}{did_you_mean(value, known)}")
        return str(value)

    def where(self, name: str) -> str:
        """The line of a key, or the file."""
        return self._settings.origin(*self._leaves[name][1]) if name in self._leaves else self._settings.name

    def spelt(self, name: str) -> str:
        """A key as the file spells it."""
        return ".".join(self._leaves[name][1]) if name in self._leaves else name

    def refusal(self, name: str, reason: str) -> UserError:
        """The error about a value: what came, and what to do."""
        value = self._leaves[name][0] if name in self._leaves else None
        return UserError(f"{self.where(name)}: {self.spelt(name)} is {shown(value)}; {reason}")

    # What the run is to be.

    def put(self, key: str, value: Any, source: str | None = None) -> None:
        """Set a key of the run.

        Args:
            key: such as "train.learning_rate".
            value: its value.
            source: the key of NeMo's that it comes from, which complaints name.
        """
        section, _, name = key.partition(".")
        self._values.setdefault(section, {})[name] = value
        if source is not None and source in self._leaves:
            self._origins[(section, name)] = f"{self.where(source)} ({self.spelt(source)})"

    def value(self, key: str) -> Any:
        """What a key of the run was set to, or None."""
        section, _, name = key.partition(".")
        return self._values.get(section, {}).get(name)

    def note(self, name: str, reason: str) -> None:
        """Say that a key means something else here."""
        self.notes.append(f"{self.where(name)}: {self.spelt(name)}: {reason}")

    def run_settings(self) -> Settings:
        """The run's settings; those of the file's own section ``fastpeft`` come last."""
        own = self._settings.values.get(OWN) or {}
        if not isinstance(own, dict) or not all(isinstance(values, dict) for values in own.values()):
            raise UserError(
                f"{self._settings.origin(OWN)}: {OWN} is {shown(own)}; it takes sections of a run, such as "
                f"{OWN}: {{train: {{report_to: none}}}}"
            )
        for section, values in own.items():
            for name, value in values.items():
                if isinstance(value, Unfilled):
                    raise UserError(
                        f"{self._settings.origin(OWN, section, name)}: {OWN}.{section}.{name} {value.reason}"
                    )
                self._values.setdefault(section, {})[name] = value
                self._origins[(section, name)] = self._settings.origin(OWN, section, name)
        return Settings(self._settings.name, dict(self._values), self._origins)

    # Whether every key is accounted for.

    def check_keys(self) -> None:
        """Refuse keys that nobody knows, and those that ask for what there is not; note those that change nothing.

        Raises:
            UserError: all of them at once.
        """
        problems, idle = [], []
        for name, (value, _) in self._leaves.items():
            where, spelt = self.where(name), self.spelt(name)
            if name.startswith(f"{OWN}."):
                continue
            if name in NEUTRAL:
                allowed, advice = NEUTRAL[name]
                if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                    problems.append(f"{where}: {spelt} is {shown(value)}; {advice}")
            elif name in TABLE or name in READ:
                continue
            elif any(fnmatchcase(name, pattern) for pattern in IGNORED):
                idle.append(spelt)
            elif value is not None or not _is_section(name):
                problems.append(f"{where}: unknown key {spelt!r}{self._nearest(name)}")
        if problems:
            raise UserError("\n".join(problems))
        if idle:
            self.notes.append(f"{self._settings.name}: without effect here: {', '.join(idle)}")

    def translate_table(self) -> None:
        """Put what `TABLE` translates one to one."""
        for name, (key, converted) in TABLE.items():
            only = next((kind for prefix, kind in ONLY_FOR.items() if name.startswith(prefix)), self.kind)
            if name in self._leaves and only == self.kind:
                self.get(name)
                self.put(key, converted(self._leaves[name][0]), name)

    def _kind(self) -> str:
        trainer = self._settings.values.get("trainer")
        trainer = trainer if isinstance(trainer, dict) else {}
        named = [name for name in ALIGNER if name in trainer]
        other = next((name for name in OTHER_TRAINERS if name in trainer), None)
        if other is not None:
            raise UserError(
                f"{self._settings.origin('trainer', other)}: trainer.{other} is a trainer that this version does not "
                f"have; {OTHER_TRAINERS[other]}"
            )
        if isinstance(ppo := trainer.get("ppo"), dict) and "port" in ppo:
            raise UserError(
                f"{self._settings.origin('trainer', 'ppo', 'port')}: this is NeMo-Aligner's critic; policy, value "
                "and reward are one run here: use the actor's file"
            )
        if len(named) > 1:
            raise UserError(
                f"{self._settings.origin('trainer', named[1])}: trainer has sections {' and '.join(named)}; a run is "
                "one of them"
            )
        return ALIGNER[named[0]] if named else "sft"

    @property
    def is_aligner(self) -> bool:
        """Whether the file is in NeMo-Aligner's spelling."""
        trainer = self._settings.values.get("trainer")
        return isinstance(trainer, dict) and any(name in trainer for name in ALIGNER)

    @property
    def file(self) -> str:
        """The file, as the user named it."""
        return self._settings.name

    def _nearest(self, name: str) -> str:
        known = {*TABLE, *READ, *NEUTRAL, *(key for key in IGNORED if "*" not in key)}
        section, _, last = name.rpartition(".")
        beside = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
        if near := difflib.get_close_matches(last, beside, n=1):
            return f"; did you mean {near[0]!r}?"
        # Names such as "seed" and "port" stand in many places; those of several words tell more.
        homes = sorted(key for key in known if key.endswith(f".{last}")) if "_" in last else []
        if homes:
            return f"; it belongs at {' or '.join(homes[:2])}"
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            return f"; did you mean {close[0]!r}?"
        return f"; leave it out (on the command line: ~{self.spelt(name)}); {OWN}.SECTION.KEY is a setting of the run"


def _leaves(values: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Keys and values without the sections around them; an empty section counts as null."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*key, name))
        else:
            yield (*key, name), None if value == {} else value


def _is_section(name: str) -> bool:
    """Whether known keys begin with this one, so that a null there is an empty section."""
    return any(key.startswith(f"{name}.") for key in (*TABLE, *READ, *NEUTRAL, *IGNORED))


def count_rows(path: Path) -> int:
    """Lines with something in them."""
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
