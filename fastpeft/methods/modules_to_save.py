"""ModulesToSaveWrapper: a frozen module with whole trainable copies of it, one an adapter.

For parts that low-rank updates cannot express, such as a new output head. Names are PEFT's (``original_module``,
``modules_to_save.<adapter>``), so that parameter names and files agree.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.nn import Adapted


class ModulesToSaveWrapper(Adapted):
    """Run the active adapter's copy of a module, or the original when there is none.

    Args:
        module: the module to copy; it is kept and frozen.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.original_module.requires_grad_(False)
        self.train(module.training)

    def add_adapter(self, adapter_name: str) -> None:
        """Copy the original for an adapter; the copy shares no memory with it.

        Args:
            adapter_name: a new name.
        """
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module)

    def held(self) -> list[str]:
        """Names of the adapters that have a copy."""
        return list(self.modules_to_save)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's copy.

        Args:
            adapter_name: names without a copy here are ignored.
        """
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]

    def parts(self, adapter_name: str) -> dict[str, str]:
        """All tensors of the copy."""
        names = self.modules_to_save[adapter_name].state_dict()
        return {f"modules_to_save.{adapter_name}.{name}": name for name in names}

    @property
    def current(self) -> nn.Module:
        """The module that a forward pass runs: the first active adapter's copy, or the original."""
        working = self.working()
        return self.modules_to_save[working[0]] if working else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``current`` with whatever the original takes; in a mixed batch each sample's own, on one tensor."""
        if self.routing is None:
            return self.current(*args, **kwargs)
        (x, *rest) = args
        out: Tensor = self.original_module(x, *rest, **kwargs)
        for name, rows in self.routes(x.shape[0], x.device):
            copied = self.modules_to_save[name](x.index_select(0, rows), *rest, **kwargs)
            out = torch.index_copy(out, 0, rows, copied.to(out.dtype))
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):  # not yet set up: copying and unpickling ask early
                raise
            return getattr(self.current, name)
