"""AdapterConfig: what the configurations of all methods share: reading and writing PEFT's keys, and checks.

The same names serve Python, YAML and ``adapter_config.json``. PEFT's files have further keys; the tables of each class
say which of them carry no meaning here and which stand for something this version cannot do. The latter are accepted at
their neutral value and refused at any other, because ignoring them would change the model's output.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from fastpeft.errors import UserError, did_you_mean

TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
_HEAD_TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT adds the task's head to modules_to_save
_NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "layers_pattern")

_Config = TypeVar("_Config", bound="AdapterConfig")


class AdapterConfig:
    """Base of the configurations, which are dataclasses.

    Attributes:
        PEFT_TYPE: the method's name in files.
        IGNORED: keys of PEFT's file that say nothing about the adapter's mathematics.
        NEUTRAL: PEFT options that this version does not have, with the values that switch them off.
        OWN: fields that PEFT does not know; they are written to a file of ours.
        MEANING: fields that decide what weights mean: trained under one value they are wrong under another.
    """

    PEFT_TYPE: ClassVar[str]
    IGNORED: ClassVar[frozenset[str]] = frozenset({"auto_mapping", "peft_type", "peft_version"})
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}
    OWN: ClassVar[tuple[str, ...]] = ()
    MEANING: ClassVar[tuple[str, ...]] = ()

    # Fields that every configuration declares.
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    inference_mode: bool

    @property
    def peft_type(self) -> str:
        """The method's name in files."""
        return self.PEFT_TYPE

    def to_dict(self) -> dict[str, Any]:
        """The configuration under PEFT's keys, as ``adapter_config.json`` holds it."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"peft_type": self.PEFT_TYPE, **{k: v for k, v in values.items() if k not in self.OWN}}

    def own_dict(self) -> dict[str, Any]:
        """Fields that PEFT does not know, where they differ from their defaults."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name in self.OWN if (value := getattr(self, name)) != defaults[name]}

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any], where: str | None = None) -> _Config:
        """Read a configuration from PEFT's keys.

        Args:
            values: the content of ``adapter_config.json``, or the same keys from elsewhere.
            where: what error messages call the source, for example the file's path.
        Returns:
            The configuration; keys that carry no meaning here are dropped.
        Raises:
            UserError: a key is unknown, or its value asks for something this version does not do.
        """
        where = cls.__name__ if where is None else where
        peft_type = values.get("peft_type", cls.PEFT_TYPE)
        peft_type = str(getattr(peft_type, "value", peft_type))
        if peft_type.upper() != cls.PEFT_TYPE:
            raise UserError(f"{where}: peft_type is '{peft_type}'; {cls.__name__} reads '{cls.PEFT_TYPE}'")
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        kept = {}
        for key, value in values.items():
            if key in known:
                kept[key] = getattr(value, "value", value)  # PEFT's enumerations
            elif key in cls.NEUTRAL:
                if value not in cls.NEUTRAL[key]:
                    raise UserError(
                        f"{where}: {key}={value!r} is a PEFT option that this version does not have, and leaving it "
                        f"out would change the result; remove the key if it was not meant, or use PEFT for this adapter"
                    )
            elif key not in cls.IGNORED:
                near = difflib.get_close_matches(str(key), [*known, *cls.NEUTRAL], n=2)
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known keys: {', '.join(known)}"
                raise UserError(f"{where}: unknown key {key!r}; {hint}")
        try:
            return cls(**kept)
        except UserError as error:
            raise UserError(str(error).replace(cls.__name__, where, 1)) from error

    # Checks that the classes share.

    def _complain(self, message: str) -> UserError:
        return UserError(f"{type(self).__name__}: {message}")

    def _tidy(self, *names: str) -> None:
        """Turn tuples and sets into lists and enumerations into strings; an empty list means None."""
        for name in names:
            value = _as_list(getattr(self, name))
            setattr(self, name, None if value == [] and name != "target_modules" else value)
        if self.task_type is not None:
            self.task_type = str(getattr(self.task_type, "value", self.task_type))

    def _check_task_type(self) -> None:
        if self.task_type in _HEAD_TASK_TYPES:
            raise self._complain(
                f"task_type={self.task_type!r} trains a task head, which this version does not add by "
                "itself; leave task_type out and name the head in modules_to_save, for example ['score']"
            )
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            hint = did_you_mean(self.task_type.upper(), TASK_TYPES)
            raise self._complain(f"task_type={self.task_type!r}; must be one of {', '.join(TASK_TYPES)}{hint}")

    def _check_module_names(self) -> None:
        """Check the fields that name modules, of those that the class has."""
        values = {name: getattr(self, name) for name in _NAMES if hasattr(self, name)}
        for name, value in values.items():
            if isinstance(value, list) and not all(isinstance(entry, str) and entry for entry in value):
                raise self._complain(f"{name}={value!r}; must be a list of module names")
        parameters = getattr(self, "target_parameters", None)
        if isinstance(parameters, str):
            raise self._complain(f"target_parameters={parameters!r}; must be a list, ['{parameters}']")
        if "target_modules" in values and values["target_modules"] in ([], "") and not parameters:
            raise self._complain("target_modules is empty; name some linear layers, or use 'all-linear'")
        if isinstance(saved := values.get("modules_to_save"), str):
            raise self._complain(f"modules_to_save={saved!r}; must be a list, ['{saved}']")
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(value := values.get(name), str):
                self._check_expression(name, value)

    def _check_expression(self, name: str, expression: str) -> None:
        try:
            re.compile(expression)
        except re.error as error:
            raise self._complain(f"{name}: {expression!r} is not a regular expression: {error}") from error

    def _check_whole(self, *names: str) -> None:
        """Whole numbers of at least 1."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise self._complain(f"{name}={value!r}; must be a whole number of at least 1")

    def _check_probability(self, name: str) -> None:
        value = getattr(self, name)
        if not is_number(value) or not 0 <= value < 1:
            raise self._complain(f"{name}={value!r}; must be a probability, at least 0 and below 1")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            hint = did_you_mean(value, choices)
            raise self._complain(f"{name}={value!r}; must be one of {', '.join(map(repr, choices))}{hint}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _as_list(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if not isinstance(value, (str, Mapping)) and hasattr(value, "__iter__") else value
