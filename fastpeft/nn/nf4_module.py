"""``NF4Module``: what every module with weights in 4 bits does when it is cast, moved, copied, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor, nn

from fastpeft.ops import NF4Weight

_Self = TypeVar("_Self", bound="NF4Module")


class NF4Module(nn.Module):
    """A module some of whose parameters are codes of NF4 weights, uint8 and without gradient.

    Its ``state_dict`` has bitsandbytes' keys and bytes. Scales stay float32 when the model is cast
    (``model.to(torch.bfloat16)``): a cast scale would silently change every weight. For that reason they are no
    buffers; they are replaced, never written, so that copies may share them.

    Args:
        weights: the packed weights by the names of their parameters.
    """

    def __init__(self, **weights: NF4Weight) -> None:
        super().__init__()
        self._packed: dict[str, NF4Weight] = {}
        for name, nf4 in weights.items():
            self._hold(name, nf4)

    @property
    def packed(self) -> Mapping[str, NF4Weight]:
        """The packed weights by the names of their parameters."""
        return MappingProxyType(self._packed)

    def _hold(self, name: str, nf4: NF4Weight) -> None:
        self.register_parameter(name, nn.Parameter(nf4.codes, requires_grad=False))
        self._packed[name] = nf4

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, nf4 in self._packed.items():
            codes = self.get_parameter(name).data
            if codes.device.type == "meta":
                raise ValueError(
                    f"{type(self).__name__}: a quantised weight cannot be moved to the meta device: its scales are data"
                )
            if codes.device != nf4.device:
                self._packed[name] = replace(nf4, codes=codes).to(codes.device)  # the codes are there already
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, nf4 in self._packed.items():
            stored = nf4.state_dict(prefix, name)
            del stored[prefix + name]  # the parameter is there already
            destination.update(stored)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = dict(state_dict)
        for name, held in list(self._packed.items()):
            key = prefix + name
            own = [stored for stored in rest if stored == key or stored.startswith(f"{key}.")]
            for stored in own:
                del rest[stored]
            if own:
                self._load(name, held, state_dict, prefix, error_msgs)
            elif strict:
                missing_keys.append(key)
        ignored: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, ignored, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in ignored if key.removeprefix(prefix) not in self._packed)

    def _load(self, name: str, held: NF4Weight, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
        try:
            loaded = NF4Weight.from_state_dict(state_dict, prefix, name)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if loaded.shape == held.shape:
            self._hold(name, loaded.to(held.device))
        else:
            error_msgs.append(f"{prefix}{name} has shape {loaded.shape}; this layer has {held.shape}")

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        copied = copy.copy(self)
        memo[id(self)] = copied
        apart = ("_packed", "_parameters")
        rest = {name: value for name, value in self.__dict__.items() if name not in apart}
        copied.__dict__.update(copy.deepcopy(rest, memo))
        copied._parameters, copied._packed = {}, {}
        for name, parameter in self._parameters.items():  # in this order, which is that of the state dict
            nf4 = self._packed.get(name)
            if nf4 is None:
                copied._parameters[name] = copy.deepcopy(parameter, memo)
            else:
                copied._hold(name, replace(nf4, codes=nf4.codes.clone()))
        return copied
