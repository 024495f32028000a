"""Whole jobs on top of the other rooms: YAML, loading, ``run_sft`` and its kin, generation, plots, ``environment``.

Names are imported when first used: ``environment`` has to report a native core that does not load, and ``plot_run``
needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpeft.recipes.chat import Chat, converse
    from fastpeft.recipes.check import CheckReport, Finding, run_check
    from fastpeft.recipes.config_files import json_schema, starting_file
    from fastpeft.recipes.export import Export, base_of_adapter, run_export
    from fastpeft.recipes.generate import generate_answers, load_for_generation, read_prompts
    from fastpeft.recipes.info import environment
    from fastpeft.recipes.load import load_model, load_tokenizer
    from fastpeft.recipes.nemo_yaml import NemoRun, load_nemo
    from fastpeft.recipes.plot import plot_run
    from fastpeft.recipes.preferences import run_config, run_dpo, run_ppo, run_reward
    from fastpeft.recipes.run_folder import run_sources
    from fastpeft.recipes.schema import (
        DataSection,
        ModelConfig,
        PeftSection,
        RunConfig,
        TrainSection,
        load_config,
        read_model_config,
    )
    from fastpeft.recipes.sft import run_sft

__all__ = [
    "Chat",
    "CheckReport",
    "DataSection",
    "Export",
    "Finding",
    "ModelConfig",
    "NemoRun",
    "PeftSection",
    "RunConfig",
    "TrainSection",
    "base_of_adapter",
    "converse",
    "environment",
    "generate_answers",
    "json_schema",
    "load_config",
    "load_for_generation",
    "load_model",
    "load_nemo",
    "load_tokenizer",
    "plot_run",
    "read_model_config",
    "read_prompts",
    "run_check",
    "run_config",
    "run_dpo",
    "run_export",
    "run_ppo",
    "run_reward",
    "run_sft",
    "run_sources",
    "starting_file",
]

_FILES = {
    "CheckReport": "check",
    "Finding": "check",
    "Export": "export",
    "NemoRun": "nemo_yaml",
    "base_of_adapter": "export",
    "Chat": "chat",
    "converse": "chat",
    "environment": "info",
    "generate_answers": "generate",
    "json_schema": "config_files",
    "load_for_generation": "generate",
    "load_model": "load",
    "load_nemo": "nemo_yaml",
    "load_tokenizer": "load",
    "plot_run": "plot",
    "read_prompts": "generate",
    "run_check": "check",
    "run_export": "export",
    "run_config": "preferences",
    "run_dpo": "preferences",
    "run_ppo": "preferences",
    "run_reward": "preferences",
    "run_sft": "sft",
    "run_sources": "run_folder",
    "starting_file": "config_files",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'fastpeft.recipes' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastpeft.recipes.{_FILES.get(name, 'schema')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
