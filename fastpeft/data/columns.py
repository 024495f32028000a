"""Rows of many lengths as a few flat columns: filled while rows are made, written to a cache, and mapped from it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastpeft.data.layout import Encoder
from fastpeft.data.report import Report

_ARRAYS = {"<i4": "i", "<i8": "q", "<f8": "d"}
_TORCH = {"<i4": torch.int32, "<i8": torch.int64, "<f8": torch.float64, "?": torch.bool, "u1": torch.uint8}


@dataclass(frozen=True)
class Column:
    """How a column is stored.

    Args:
        dtype: numpy's name of it.
        ends_in: for offsets, the column whose pieces they bound: piece i is from offset i to offset i + 1.
    """

    dtype: str
    ends_in: str | None = None


class RowBuilder:
    """Turns records into rows, and counts what becomes of them; a subclass says how, for one kind of row.

    Args:
        report: counts what becomes of each record.
    """

    columns: ClassVar[Mapping[str, Column]]
    report: Any

    def __init__(self, report: Report) -> None:
        self.report = report
        self.data: dict[str, Any] = {}
        for name, column in self.columns.items():
            begin = [0] if column.ends_in else []
            self.data[name] = array(_ARRAYS[column.dtype], begin) if column.dtype in _ARRAYS else bytearray()

    def add(self, records: Sequence[Any], encoder: Encoder) -> None:
        """Tokenise records and make them fit; what the template refuses becomes a complaint."""
        raise NotImplementedError

    def flatten(self) -> None:
        """Put what is held in another form while rows are made into columns; called before they are written."""

    def tensors(self) -> dict[str, Tensor]:
        """The columns, without a copy."""
        kinds = {name: _TORCH[column.dtype] for name, column in self.columns.items()}
        return {
            name: torch.frombuffer(self.data[name], dtype=kind) if self.data[name] else torch.empty(0, dtype=kind)
            for name, kind in kinds.items()
        }
