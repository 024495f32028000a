"""Where a text's tokens stand once virtual tokens are put before it, or before each text of a packed row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft.errors import UserError


@dataclass(frozen=True)
class Layout:
    """A batch with room for virtual tokens.

    Attributes:
        place: ``(b, t)`` or ``(1, t)``, where each token of the text comes to stand.
        virtual: ``(b, s v)`` or ``(1, s v)``, where the virtual tokens of its s sequences stand.
        count: v.
    """

    place: Tensor
    virtual: Tensor
    count: int

    @classmethod
    def plain(cls, count: int, length: int, device: torch.device) -> Layout:
        """One text a row: the virtual tokens come first."""
        places = torch.arange(count + length, device=device)[None]
        return cls(places[:, count:], places[:, :count], count)

    @classmethod
    def packed(cls, count: int, position_ids: Tensor) -> Layout:
        """Several texts a row, told by positions that begin anew, as transformers tells them.

        Raises:
            UserError: rows of different numbers of texts.
        """
        begins = _begins(position_ids)
        number = begins.long().cumsum(1)
        texts = number[:, -1]
        if bool((texts != texts[0]).any()):
            raise UserError(
                f"position_ids: the rows of a batch hold {', '.join(map(str, texts.tolist()))} packed texts, and "
                "virtual tokens would make them of different lengths; give one row at a time"
            )
        steps = torch.arange(position_ids.shape[1], device=position_ids.device)
        place = steps + count * number
        first = place[begins].view(len(place), -1, 1) - count
        virtual = (first + torch.arange(count, device=position_ids.device)).flatten(1)
        return cls(place, virtual, count)

    @classmethod
    def grown(cls, extra: int, length: int, mask: Tensor | None, position_ids: Tensor | None) -> Layout:
        """The layout of a batch whose rows of some length came out longer.

        Args:
            extra: by how many tokens.
            length: of the text.
            mask: as it was given with the text.
            position_ids: the same.
        """
        if position_ids is None or mask is not None:
            return cls.plain(extra, length, torch.device("cpu"))  # `take` moves it
        return cls.packed(extra // int(_begins(position_ids)[0].sum()), position_ids)

    def insert(self, text: Tensor, virtual: Tensor) -> Tensor:
        """Put a batch together.

        Args:
            text: ``(b, t, ...)``.
            virtual: ``(b, v, ...)``, the same for all texts of a row.
        Returns:
            ``(b, t + s v, ...)``, dtype of the text.
        """
        rows, rest = text.shape[0], text.shape[2:]
        texts = self.virtual.shape[1] // self.count
        whole = text.new_zeros(rows, self.place.shape[1] + self.virtual.shape[1], *rest)
        for places, values in ((self.place, text), (self.virtual, virtual.repeat(1, texts, *(1 for _ in rest)))):
            index = places.expand(rows, -1).view(rows, -1, *(1 for _ in rest)).expand(-1, -1, *rest)
            whole = whole.scatter(1, index, values.to(text.dtype))
        return whole

    def constant(self, text: Tensor, value: int) -> Tensor:
        """The same with one value for all virtual tokens; text ``(b, t)``."""
        return self.insert(text, text.new_full((text.shape[0], self.count), value))

    def moved(self, keep: Tensor) -> Tensor:
        """Where positions ``(p,)`` of the text come to stand.

        Raises:
            UserError: they differ from row to row.
        """
        if len(self.place) > 1:
            raise UserError("logits_to_keep: packed rows with virtual tokens need it one row at a time")
        return self.place[0, keep.to(self.place.device)]

    def take(self, outputs: Tensor) -> Tensor:
        """What belongs to the text of ``(b, t + s v, n)``."""
        place = self.place.to(outputs.device)
        index = place.expand(outputs.shape[0], -1)[..., None].expand(-1, -1, outputs.shape[-1])
        return outputs.gather(1, index)


def _begins(position_ids: Tensor) -> Tensor:
    """Where a text of a packed row begins."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    return begins
