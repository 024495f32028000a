"""pytest-benchmark's records carry the conditions of the run, as those of ``python -m bench`` do."""

from __future__ import annotations

from typing import Any

import pytest

from bench.__main__ import pick_device
from bench.environment import environment


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add device, driver, versions and commit."""
    machine_info["fastpeft"] = environment(pick_device(None)).as_dict()
