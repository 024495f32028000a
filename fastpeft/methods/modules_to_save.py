"""ModulesToSaveWrapper: a frozen module with whole trainable copies of it, one an adapter.

For parts that low-rank updates cannot express, such as a new output head. Names are PEFT's (``original_module``,
``modules_to_save.<adapter>``), so that parameter names and files agree.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class ModulesToSaveWrapper(nn.Module):
    """Run the active adapter's copy of a module, or the original when there is none.

    Args:
        module: the module to copy; it is kept and frozen.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.adapters_disabled = False
        self.original_module.requires_grad_(False)
        self.train(module.training)

    def add_adapter(self, adapter_name: str) -> None:
        """Copy the original for an adapter; the copy shares no memory with it.

        Args:
            adapter_name: a new name.
        """
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's copy.

        Args:
            adapter_name: names without a copy here are ignored.
        """
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]

    @property
    def current(self) -> nn.Module:
        """The module that a forward pass runs: the first active adapter's copy, or the original."""
        if not self.adapters_disabled:
            for name in self.active_adapters:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``current`` with whatever the original takes."""
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):  # not yet set up: copying and unpickling ask early
                raise
            return getattr(self.current, name)
