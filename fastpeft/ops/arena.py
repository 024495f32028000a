"""Memory for optimizer state of which each page lies on the device or on the host, as told."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastpeft.ops import native

Mode = Literal["managed", "pinned"]


class _Bytes:
    """Memory of the arena as torch takes it without a copy; keeps the arena alive for as long as the tensor lives."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
            "strides": None,
        }
        self.owner = owner


class Arena:
    """One allocation in pages of 2 MB, each on the device or on the host.

    Args:
        nbytes: size; rounded up to whole pages. All pages begin on the host, zero.
        device: the CUDA device.
        mode: ``"pinned"``: pages of the device beside pinned host memory for all pages, copied at the link's speed.
            ``"managed"``: unified memory, one address whatever the place, and host memory only for what lies there, but
            stepped at a quarter of that speed.
        slot_bytes: size of each of the three slots through which far state is stepped (``AdamWFarList``).
    Attributes:
        nbytes: as rounded up.
        page_bytes: 2 MB.
        mode: ``"managed"`` or ``"pinned"``.
    Raises:
        fastpeft.CudaError: there is not enough memory on the host, or no CUDA.
    """

    page_bytes = 2 << 20

    def __init__(self, nbytes: int, device: torch.device, mode: Mode = "pinned", *, slot_bytes: int = 16 << 20) -> None:
        if device.type != "cuda":
            raise ValueError(f"Arena: device is {device}; an arena needs a CUDA device")
        if mode not in ("managed", "pinned"):
            raise ValueError(f"Arena: mode is {mode!r}; it can be 'managed' or 'pinned'")
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        with torch.cuda.device(self.device):
            self._native: Any = native.arena(nbytes, mode == "managed", slot_bytes)
        self.nbytes: int = self._native.nbytes
        self.mode: Mode = "managed" if self._native.managed else "pinned"

    def view(self, offset: int, nbytes: int) -> Tensor:
        """Bytes of the arena as a uint8 tensor, without a copy.

        Managed: a CUDA tensor, whose pages may lie in both places. Pinned: a CUDA tensor where the pages lie on the
        device, a tensor in pinned host memory where they lie on the host; it is good until these pages are moved.

        Raises:
            ValueError: a range outside the arena or, pinned, of pages of both places.
        """
        address, on_device = self._native.view(offset, nbytes)
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        if on_device:
            return torch.as_tensor(_Bytes(address, nbytes, self._native), device=self.device)
        return native.host_bytes(address, nbytes, self._native)

    def move(self, first_page: int, pages: int, place: Literal["device", "host"]) -> None:
        """Move pages behind the work of the current stream, their contents kept; pages that are there stay.

        Pinned pages that leave the device are given back to it, for which this waits for the stream.

        Raises:
            ValueError: pages outside the arena.
            fastpeft.CudaError: the device has no room (pinned); the pages then stay where they were.
        """
        if place not in ("device", "host"):
            raise ValueError(f"Arena: place is {place!r}; it can be 'device' or 'host'")
        with torch.cuda.device(self.device):
            self._native.move(first_page, pages, place == "device", native.stream_context(self.device))

    def stage(self, adamw_list: Any) -> None:
        """Make a native list of rows on host pages one that is stepped through the slots."""
        with torch.cuda.device(self.device):
            adamw_list.stage(self._native)

    def places(self) -> list[bool]:
        """For each page whether it lies on the device."""
        found: list[bool] = self._native.places()
        return found

    def memory(self) -> dict[str, int]:
        """Bytes by place, slots left out: ``{"device": ..., "host": ...}``."""
        on_device = sum(self.places()) * self.page_bytes
        return {"device": on_device, "host": self.nbytes - on_device}
