"""Run PEFT's own tests of custom models with fastpeft's LoRA layer in the place of PEFT's.

    python scripts/peft_conformance.py PATH [--stock] [pytest arguments]

PATH is a checkout or an unpacked source distribution of PEFT, best of the installed version; ``--stock`` runs the same
tests without the substitution, for comparison. What runs is ``tests/test_custom_models.py``, its LoRA, DoRA and (IA)3
cases on MLP and embedding models, without network. Substituted is the layer for ``nn.Linear`` that ``use_in_peft``
registers; LoRA of embeddings and (IA)3 have no layer of ours under PEFT and run as they are beside it. PEFT's tests
import diffusers, datasets and parameterized.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import pytest
from peft.tuners.lora import model as lora_model
from torch import nn

from fastpeft.models import stock_peft

# Methods of PEFT whose names hold "lora" too are somebody else's.
OTHERS = [
    *("GLoRA", "AdaLoRA", "GraLoRA", "RandLoRA", "VeLoRA", "MonteCLoRA", "DeLoRA", "BDLoRA", "LoRAGA", "aLoRA"),
    *("KaSA", "MiCA", "TinyLoRA", "UniLoRA", "VBLoRA"),
]
SELECTED = f"(LoRA or DoRA or IA3) and (MLP or Emb) and not ({' or '.join(OTHERS)})"


class Substitution:
    """A pytest plugin that hands fastpeft's layer to PEFT's dispatcher and counts what became of it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_configure(self) -> None:
        """Put the layer where PEFT makes its own for ``nn.Linear``, and count calls of the fused op."""
        fused, default, op = stock_peft.fused_lora_class(), lora_model.dispatch_default, stock_peft.lora_linear

        def dispatch(target: nn.Module, adapter_name: str, config: Any, **options: Any) -> nn.Module | None:
            base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
            # Not made by PEFT first: the random draws that took would give every test other weights.
            if type(base) is not nn.Linear or config.fan_in_fan_out or options.get("parameter_name") is not None:
                return default(target, adapter_name, config=config, **options)
            self.counts["layers substituted"] += 1
            return fused(target, adapter_name, config=config, **options)

        def counted(*arguments: Any) -> Any:
            self.counts["calls of the fused op"] += 1
            return op(*arguments)

        lora_model.dispatch_default = dispatch
        stock_peft.lora_linear = counted

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say how much was fastpeft's, so that a run without any is not taken for a pass."""
        terminalreporter.write_line(f"fastpeft: {dict(self.counts) or 'nothing was substituted'}")


def main(arguments: list[str]) -> int:
    """Run the tests.

    Args:
        arguments: of the command line.
    Returns:
        pytest's exit code; 2 for a wrong path.
    """
    stock = "--stock" in arguments
    path, *rest = [argument for argument in arguments if argument != "--stock"] or [""]
    tests = Path(path) / "tests" / "test_custom_models.py"
    if not path or not tests.is_file():
        print(f"usage: {sys.argv[0]} PATH [--stock] [pytest arguments]; no {tests}", file=sys.stderr)
        return 2
    found = re.search(r'^__version__ = "(.+)"', (Path(path) / "src/peft/__init__.py").read_text(), re.MULTILINE)
    print(f"peft {peft.__version__} is installed; the tests are of {found[1] if found else 'an unknown version'}")
    os.chdir(path)
    options = [
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "-q",
        "-k",
        SELECTED,
        *rest,
        "tests/test_custom_models.py",
    ]
    return int(pytest.main(options, plugins=[] if stock else [Substitution()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
